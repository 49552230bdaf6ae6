"""Masked operations in which a masked slot cannot be heard: not in the value, not in the gradient (law 1).

The idiom is a double `where`: replace masked *inputs* by a safe constant before anything non-linear, then mask the output.
`where(mask, exp(x), 0)` alone still sends NaN back, because its gradient is 0 · exp(NaN); and `x * mask` is never safe: NaN · 0 is NaN.

Masks are bool tensors of the shape of the values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked(x: Tensor, mask: Tensor, fill: float = 0.0) -> Tensor:
    """`x` with its masked slots replaced by `fill`; their gradient is exactly 0."""
    return torch.where(mask, x, fill)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over the slots that count, a scalar. Over none it is a zero that still depends on `x`, so that backward runs."""
    return masked(x, mask).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the slots that count, a scalar.

    Raises:
        ValueError: no slot counts; the mean of nothing is not 0.
    """
    if not bool(mask.any()):
        raise ValueError("the mean over a mask with no valid slot is not defined")
    return masked_sum(x, mask) / mask.sum()


def last_valid(mask_BT: Tensor) -> Tensor:
    """True at the last valid token of each row, bool [B, T]; nowhere in a row without one. The mask may have gaps."""
    valid_from_here_on_BT = mask_BT.flip(1).cumsum(1).flip(1)
    return mask_BT & (valid_from_here_on_BT == 1)
