"""Demonstrations as tokens: which of them are trained on, and rows put together as a batch.

Text and its boundary: prompt and completion are tokenised *together*, as they will stand, and a token is trained on when it reaches
beyond the prompt. (Tokenised apart, SentencePiece puts a space in front of the completion that is not in the data.)

Every row ends as a rollout ends: with a stop token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.demonstrations import DemonstrationBatch
from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.data.chat import render, render_answered
from rlhf_dist.data.layouts import Demonstration, Message, Origin

LossOn = Literal["completion", "all"]


@dataclass(frozen=True)
class TokenRow:
    """tokens int32 [L]; trained bool [L], never True for the first token, which nothing predicts; what each of them counts for.

    origin: of the record that it was made of, where that is known.
    """

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    token_weight: float = 1.0
    origin: Origin | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def weight(self) -> float:
        """Trained tokens times what each counts for: the row's part in the denominator of a loss."""
        return self.token_weight * int(self.trained.sum())

    def cut(self, length: int) -> TokenRow:
        """The first tokens."""
        return replace(self, tokens=self.tokens[:length], trained=self.trained[:length])


class DemonstrationEncoder:
    """Makes rows of demonstrations.

    Args:
        tokenizer: of the model; a fast one, because character offsets tell where the prompt ends.
        stop_tokens: ids that end a completion, beside the tokenizer's eos. A row that ends with none of them is given one (eos, or else the
            lowest), so that the model learns to end; there may be none.
        loss_on: `completion` trains on every assistant turn of a dialogue and on the completion of a text; `all` on every token.

    Raises:
        UserError: a slow tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_tokens: Collection[int], loss_on: LossOn) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                "the tokenizer has no character offsets", where="model", fix="save a fast tokenizer (tokenizer.json) beside the model"
            )
        eos: Any = tokenizer.eos_token_id
        self._tokenizer, self._all = tokenizer, loss_on == "all"
        self._stop: int | None = eos if eos is not None else min(stop_tokens, default=None)
        self._stops = [*stop_tokens, *([] if eos is None else [eos])]

    def encode(self, record: Demonstration) -> TokenRow:
        """One row, however long, with the record's weight and origin.

        Raises:
            RefusedChat: a dialogue that the chat template refuses.
            UserError: a dialogue without a chat template, with a broken one, or with one that hides what the assistant said.
        """
        row = self._dialogue(record) if record.turns else self._text(record)
        return replace(row, token_weight=record.weight, origin=record.origin)

    def _text(self, record: Demonstration) -> TokenRow:
        assert isinstance(record.prompt, str)
        return self.text(record.prompt, record.completion)

    def text(self, prompt: str, completion: str) -> TokenRow:
        """Prompt and completion as one text, with a stop token at the end."""
        return self.ended(self.spans(prompt + completion, [(len(prompt), len(prompt + completion))], special=True))

    def ended(self, row: TokenRow) -> TokenRow:
        """With a stop token at the end, as a rollout: templates put white space behind it, or leave it out."""
        stops = np.flatnonzero(np.isin(row.tokens, self._stops) & row.trained)
        if len(stops) and not str(self._tokenizer.decode(row.tokens[stops[-1] + 1 :].tolist())).strip():
            return row.cut(int(stops[-1]) + 1)
        if self._stop is None:
            return row
        return replace(row, tokens=np.append(row.tokens, np.int32(self._stop)), trained=np.append(row.trained, True))

    def _dialogue(self, record: Demonstration) -> TokenRow:
        turns, where = list(record.turns), record.origin.where
        text = render(turns, self._tokenizer, where=where, ask=False)
        return self.ended(self.spans(text, [] if self._all else self._answers(turns, text, where), special=False))

    def _answers(self, turns: list[Message], text: str, where: str) -> list[tuple[int, int]]:
        """Assistant turns by their place in the rendered text: from where the template asks for an answer to where the turn ends."""
        spans = []
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant":
                alternative = ", or set sft.loss_on=all"
                through, start = render_answered(turns[:number], turn, self._tokenizer, where=where, otherwise=alternative)
                if not text.startswith(through):
                    what = "the chat template renders earlier turns anew, so assistant turns before the last cannot be told apart"
                    raise UserError(what, where=where, fix="set sft.loss_on=all, or give rows with one answer each")
                spans.append((start, len(through)))
        return spans

    def spans(self, text: str, spans: Sequence[tuple[int, int]], *, special: bool) -> TokenRow:
        """A text whose tokens in the given spans of characters are trained on; special: whether the tokenizer adds its own tokens."""
        encoded: Any = self._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        ends = np.array([end for _, end in encoded["offset_mapping"]])
        starts = np.array([start for start, _ in encoded["offset_mapping"]])
        trained = np.full(len(ends), self._all)
        for low, high in spans:
            trained |= (ends > low) & (starts < high) & (ends > starts)
        trained[:1] = False
        return TokenRow(np.array(encoded["input_ids"], dtype=np.int32), trained)


def too_long(row: TokenRow, limit: int, where: str) -> UserError:
    """What is said of a row that exceeds `data.max_tokens` where nothing may be dropped or cut."""
    fix = "raise data.max_tokens, or set data.overlong: drop or truncate"
    return UserError(f"the row has {len(row)} tokens, the limit is {limit}", where=where, fix=fix)


def collate(rows: Sequence[TokenRow]) -> SequenceBatch:
    """A padded batch: a row's prompt is what stands before its first trained token, its response the rest; untrained tokens in it are
    attended to and masked out of the loss.

    Raises:
        ValueError: a row without a trained token.
    """
    cuts = [int(row.trained.argmax()) for row in rows]
    if not all(row.trained.any() for row in rows):
        raise ValueError("a row without a trained token cannot be trained on")
    prompt, response = max(cuts), max(len(row) - cut for row, cut in zip(rows, cuts, strict=True))
    prompt_tokens, prompt_mask = np.zeros((len(rows), prompt), np.int64), np.zeros((len(rows), prompt), bool)
    tokens, mask, attention = (
        np.zeros((len(rows), response), np.int64),
        np.zeros((len(rows), response), bool),
        np.zeros((len(rows), response), bool),
    )
    for number, (row, cut) in enumerate(zip(rows, cuts, strict=True)):
        prompt_tokens[number, prompt - cut :], prompt_mask[number, prompt - cut :] = row.tokens[:cut], True
        rest = len(row) - cut
        tokens[number, :rest], mask[number, :rest], attention[number, :rest] = row.tokens[cut:], row.trained[cut:], True
    return SequenceBatch(*(torch.from_numpy(array) for array in (prompt_tokens, prompt_mask, tokens, mask, attention)))


def collate_demonstrations(rows: Sequence[TokenRow]) -> DemonstrationBatch:
    """`collate`, with the weights of the rows."""
    return DemonstrationBatch(**vars(collate(rows)), weight_B=torch.tensor([row.token_weight for row in rows]))
