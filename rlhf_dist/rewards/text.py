"""From rollouts to the tokens of a reward model, which may speak another tokenizer, and another chat template, than the policy."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import ExperienceBatch, StopReason
from rlhf_dist.data.chat import checked_chat, render
from rlhf_dist.data.records import keep_end
from rlhf_dist.models.classifier import EncodedTexts

BEHAVIOUR = ("model", "normalizer", "pre_tokenizer", "post_processor")


class RewardEncoder:
    """Encodes prompt + completion for one reward model.

    - Where the prompt is a chat and the reward model's template is not the policy's: the reward model's template over the messages and
      the completion as the assistant's turn.
    - Otherwise, where the reward model's tokenizer knows the policy's ids (`same_tokenizer`): the ids as they are, stop token included.
    - Otherwise: the text (special tokens and the stop token removed), tokenised with the special tokens of the reward model's tokenizer.

    Args:
        max_tokens: longest input; None: no limit.
        overlong: refuse a longer one, or keep its last `max_tokens` tokens (special tokens that the tokenizer adds stay) and count it.
        messages_field: the column that holds the chat.

    Raises:
        UserError: a limit that leaves no room for text.
    """

    def __init__(
        self,
        reward_tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        max_tokens: int | None,
        overlong: Literal["error", "truncate_left"],
        messages_field: str = "messages",
    ) -> None:
        self._reward: Any = copy.deepcopy(reward_tokenizer)
        self._reward.truncation_side = "left"
        self._policy: Any = policy_tokenizer
        self._limit, self._overlong, self._messages_field = max_tokens, overlong, messages_field
        self.same_tokenizer = same_tokenizer(reward_tokenizer, policy_tokenizer)
        self._own_template = bool(reward_tokenizer.chat_template) and not (
            self.same_tokenizer and reward_tokenizer.chat_template == policy_tokenizer.chat_template
        )
        if max_tokens is not None and max_tokens <= self._reward.num_special_tokens_to_add():
            raise UserError(
                f"max_tokens is {max_tokens}: no room for text", where="reward.sources", fix="raise max_tokens of the model reward"
            )

    def encode(self, batch: ExperienceBatch) -> EncodedTexts:
        """Tokens of every row. A row without any text gets no tokens: its reward has nothing to judge.

        Raises:
            UserError: a row longer than the limit, where `overlong` is `error`; a chat that the reward model's template refuses.
        """
        rows = [self._row(batch, row) for row in range(len(batch))]
        return EncodedTexts.from_rows([tokens for tokens, _ in rows], sum(cut for _, cut in rows))

    def _row(self, batch: ExperienceBatch, row: int) -> tuple[list[int], bool]:
        prompt = batch.prompt_tokens_BP[row][batch.prompt_mask_BP[row]].tolist()
        response = batch.response_tokens_BT[row][batch.response_attention_BT[row]].tolist()
        chat = self._chat(batch, row, prompt) if self._own_template else None
        if chat is not None:
            return self._fitted(row, self._ids(self._templated(chat, batch.completions[row], row), add_special_tokens=False))
        if self.same_tokenizer:
            return self._fitted(row, prompt + response)
        if int(batch.stop_reason_B[row]) == StopReason.STOP_TOKEN:
            response = response[:-1]
        # Decoded in one piece: a completion decoded alone may lose the space that it begins with.
        text = self._policy.decode(prompt + response, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        tokens = self._ids(text) if text else []
        if self._limit is None or len(tokens) <= self._limit or self._overlong == "error":
            return self._fitted(row, tokens)
        return self._ids(text, truncation=True, max_length=self._limit), True

    def _fitted(self, row: int, tokens: list[int]) -> tuple[list[int], bool]:
        if self._limit is None or len(tokens) <= self._limit:
            return tokens, False
        if self._overlong == "error":
            raise UserError(
                f"row {row}: prompt and completion have {len(tokens)} tokens for the reward model, which takes {self._limit}",
                where="reward model input",
                fix="set overlong: truncate_left for this reward, or lower data.max_prompt_tokens or rollout.max_new_tokens",
            )
        return list(keep_end(tuple(tokens), self._limit, self._reward.bos_token_id)), True

    def _ids(self, text: str, **options: Any) -> list[int]:
        return list(self._reward(text, verbose=False, **options)["input_ids"])

    def _chat(self, batch: ExperienceBatch, row: int, prompt: Sequence[int]) -> list[dict[str, Any]] | None:
        """The row's messages if the prompt was made from them; a column of the same name may also hold a reference conversation."""
        column = batch.columns.get(self._messages_field)
        messages = column[row] if column is not None else None
        if messages is None or not self._policy.chat_template:
            return None
        try:
            chat = checked_chat(messages, f"row {row}")
            rendered = render(chat, self._policy, where=f"row {row}", ask=True)
        except UserError:
            return None  # what the policy's template refuses cannot be where the prompt comes from
        tokens = list(self._policy(rendered, add_special_tokens=False, verbose=False)["input_ids"])
        made_of_it = tokens[-len(prompt) :] == list(prompt)  # the front may have been cut by data.overlong
        return chat if made_of_it else None

    def _templated(self, chat: list[dict[str, Any]], completion: str, row: int) -> str:
        answer = {"role": "assistant", "content": completion}
        return render([*chat, answer], self._reward, where=f"reward model input, row {row}", ask=False)


def same_tokenizer(reward: PreTrainedTokenizerBase, policy: PreTrainedTokenizerBase) -> bool:
    """Whether the reward model's tokenizer gives every text of the policy the ids that the policy's gives.

    So it is where each token of the policy, added ones included, has the same id in the reward model, and both behave alike; the reward
    model may know more tokens: one that was trained from the policy has a pad of its own (`models.reward_model.separate_pad`).
    Behaviour is the serialised model, normaliser, pre-tokeniser and post-processor. Where a tokenizer does not tell (pure Python ones),
    the answer is no, which costs a second tokenisation and nothing else.
    """
    if reward is policy:
        return True
    if not policy.get_vocab().items() <= reward.get_vocab().items():
        return False
    backends = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (reward, policy)]
    if any(backend is None for backend in backends):
        return False
    mine, theirs = (json.loads(backend.to_str()) for backend in backends if backend is not None)
    return all(mine[part] == theirs[part] for part in BEHAVIOUR)
