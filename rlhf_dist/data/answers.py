"""Answers to one prompt as tokens: what reward models and direct preference optimisation compare.

Prompt and answer are tokenised together, as they will stand, and end with a stop token, as a rollout does: a reward model then reads
its score where the policy will stop.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf_dist.data.chat import checked_chat, render_answered
from rlhf_dist.data.layouts import Origin, Prompt
from rlhf_dist.data.token_rows import DemonstrationEncoder, TokenRow, too_long

Overlong = Literal["error", "drop", "truncate"]


@dataclass(frozen=True)
class AnswersRow:
    """The answers to one prompt, best first.

    answers: whole sequences (prompt and answer), `trained` at the tokens of the answer.
    prompt: number of the prompt, the same for rows with equal prompts. source, margin, label_probability, weight, origin (where that is
    known): as in `data.layouts`.
    """

    answers: tuple[TokenRow, ...]
    prompt: int
    source: str
    margin: float | None = None
    label_probability: float | None = None
    weight: float = 1.0
    origin: Origin | None = field(default=None, compare=False)

    def __len__(self) -> int:
        """Tokens of the row in a batch, the padding of the shorter answers included."""
        return len(self.answers) * max(len(answer) for answer in self.answers)

    @property
    def tokens(self) -> int:
        """Tokens of all answers, each with its prompt."""
        return sum(len(answer) for answer in self.answers)


class AnswersEncoder:
    """Makes token rows of a prompt and its answers.

    Args:
        tokenizer: of the model; a fast one.
        stop_tokens: ids that end an answer.

    Raises:
        UserError: a slow tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_tokens: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self.bos: int | None = tokenizer.bos_token_id  # type: ignore[assignment]
        self._texts = DemonstrationEncoder(tokenizer, stop_tokens, "completion")

    def encode(self, prompt: Prompt, answer: str, *, where: str) -> TokenRow:
        """One answer, however long.

        Raises:
            RefusedChat: a dialogue that the chat template refuses.
            UserError: a dialogue without a chat template, with a broken one, or with one that hides where the answer begins.
        """
        if isinstance(prompt, str):
            return self._texts.text(prompt, answer)
        message = {"role": "assistant", "content": answer}
        whole, start = render_answered(checked_chat(list(prompt), where), message, self._tokenizer, where=where)
        return self._texts.ended(self._texts.spans(whole, [(start, len(whole))], special=False))


def fitted(rows: Sequence[TokenRow], limit: int, overlong: Overlong, where: str, bos: int | None) -> tuple[tuple[TokenRow, ...], str]:
    """The answers to one prompt within `limit` tokens, and what became of them: "" where they fit.

    `truncate` takes the same number of tokens off the front of each row, so that all answers see the same prompt; a start token stays.

    Returns:
        The rows, none of them where they are dropped; and the fate to count.

    Raises:
        UserError: a row is longer than the limit, where `overlong` is `error`.
    """
    longest = max(rows, key=len)
    excess = len(longest) - limit
    if excess <= 0:
        return tuple(rows), ""
    if overlong == "error":
        raise too_long(longest, limit, where)
    if overlong == "drop":
        return (), "dropped: longer than data.max_tokens"
    kept = 1 if bos is not None and all(row.tokens[0] == bos for row in rows) else 0
    if any(int(row.trained.argmax()) < excess + kept + 1 for row in rows):
        return (), "dropped: an answer leaves no room for its prompt in data.max_tokens"
    return tuple(_without(row, kept, excess) for row in rows), "cut: prompts shortened at the front to data.max_tokens"


def _without(row: TokenRow, start: int, count: int) -> TokenRow:
    keep = np.r_[0:start, start + count : len(row)]
    return TokenRow(row.tokens[keep], row.trained[keep])
