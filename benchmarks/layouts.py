"""Ways in which rows lie in a forward of one policy, so that one engine trains them all: ours, and the padded rectangle of the field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.models.logprobs import logprobs_and_entropy
from rlhf_dist.models.policy import PolicyModule

LAYOUTS = ("plain", "padded", "sorted", "packed")


@dataclass(frozen=True)
class Rectangle:
    """Slots that every row of an optimizer step gets: those of the longest prompt, and those of the longest completion."""

    prompt: int
    response: int

    @property
    def slots(self) -> int:
        """Of a row."""
        return self.prompt + self.response


class LayoutModule(PolicyModule):
    """A policy whose layout can be changed between steps.

    In `plain` it does what TRL and DeepSpeed-Chat do: prompts padded on the left to the longest of the whole batch, completions on the
    right, SDPA with a padding mask, the head and log-probs at every slot (TRL leaves the log-probs of prompts out). Log-probs are the
    package's own, so that nothing differs but the slots that are computed.
    """

    rectangle: Rectangle | None = None

    def lay(self, layout: str, rectangle: Rectangle) -> None:
        """From now on rows lie so."""
        self.packing = layout == "packed"
        self.rectangle = rectangle if layout == "plain" else None

    def inputs(self, batch: SequenceBatch) -> dict[str, Any]:
        """Keyword arguments of `forward` for a batch."""
        if self.rectangle is None:
            return super().inputs(batch)
        tokens, places_BT = rectangle_inputs(batch, self.rectangle)
        return {"tokens": tokens, "places_BT": places_BT}

    def _columns(self, tokens: dict[str, Tensor], places_BT: Tensor) -> tuple[Tensor, ...]:
        if self.rectangle is None:
            return super()._columns(tokens, places_BT)
        logits_BSV = self.model(**tokens, use_cache=False).logits
        per_slot = logprobs_and_entropy(logits_BSV, tokens["input_ids"].roll(-1, 1), self.options)
        return tuple(values_BS.gather(1, places_BT - 1) for values_BS in per_slot)


def rectangle_inputs(batch: SequenceBatch, rectangle: Rectangle) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of a forward in which every row is as wide as the rectangle.

    Returns:
        input_ids int64, attention_mask bool, position_ids int64, each [B, S]; and the column of each response slot, int64 [B, T].
    """
    left, right = rectangle.prompt - batch.prompt_mask_BP.shape[1], rectangle.response - batch.response_mask_BT.shape[1]
    tokens_BS = pad(torch.cat([batch.prompt_tokens_BP, batch.response_tokens_BT], 1), (left, right))
    attention_BS = pad(torch.cat([batch.prompt_mask_BP, batch.response_attention_BT], 1).bool(), (left, right))
    positions_BS = torch.where(attention_BS, attention_BS.long().cumsum(1) - 1, 0)
    places_T = rectangle.prompt + torch.arange(batch.response_mask_BT.shape[1])
    inputs = {"input_ids": torch.where(attention_BS, tokens_BS, 0), "attention_mask": attention_BS, "position_ids": positions_BS}
    return inputs, places_T.expand(len(tokens_BS), -1)
