"""Preferences as tensors: the answers of some prompts as one batch of texts, and which of them was liked better."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class PreferenceBatch:
    """B prompts with two or more answers each, N texts in all.

    Example, a pair and a ranking of three::

        answers_BK  [[0  1  .]      mask_BK  [[1  1  0]
                     [2  3  4]]               [1  1  1]]

    tokens_NL int64: prompts and answers, padded on the right with anything. mask_NL bool: the tokens that exist.
    answers_BK int64: which text is a prompt's k-th best answer, anything where it has fewer. mask_BK bool: the answers that exist, from
    the left. margin_B float32: how much better the first of a pair was said to be, 0 where nobody said. probability_B float32: that the
    first of a pair is the better one, NaN where the label is hard. weight_B float32: of the prompt in the loss.
    """

    tokens_NL: Tensor
    mask_NL: Tensor
    answers_BK: Tensor
    mask_BK: Tensor
    margin_B: Tensor
    probability_B: Tensor
    weight_B: Tensor

    def __len__(self) -> int:
        return len(self.answers_BK)

    def to(self, device: torch.device | str) -> PreferenceBatch:
        """The same on a device."""
        return PreferenceBatch(*(getattr(self, field.name).to(device) for field in fields(self)))

    def spread(self, value_N: Tensor) -> Tensor:
        """One number a text as [B, K], best answer first; 0 where there is no answer, and no gradient from there."""
        value_BK = value_N[torch.where(self.mask_BK, self.answers_BK, 0)]
        return torch.where(self.mask_BK, value_BK, 0.0)
