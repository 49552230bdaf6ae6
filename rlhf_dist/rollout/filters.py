"""Top-k and top-p: which tokens stay, and in which order, without sorting the vocabulary where its head already holds the mass.

Entries are ranked by falling weight; of equal ones the lower index comes first. Weight and index are put into one integer, so that no two
keys are equal and any way of finding the smallest keys, a partial one included, gives the same tokens in the same order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PREFILTER = 256
"""Candidates looked at first under top-p. Rows whose nucleus is wider are ranked whole."""
INDEX_BITS = 32


def ranked(weights_NV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest entries of every row and their indices, [N, count] each, by falling weight, equal ones by rising index.

    Args:
        weights_NV: float32, not negative. A row with NaN gives some valid indices.
    """
    vocabulary = weights_NV.shape[1]
    # The bits of floats that are not negative are ordered as they are. In place: a copy of the keys costs as much as finding the smallest.
    keys_NV = weights_NV.contiguous().view(torch.int32).long().neg_()
    keys_NV.bitwise_left_shift_(INDEX_BITS).bitwise_or_(torch.arange(vocabulary, device=weights_NV.device))
    smallest_NK = _smallest(keys_NV, count)
    bits_NK = (smallest_NK >> INDEX_BITS).neg_().to(torch.int32)
    return bits_NK.view(torch.float32), smallest_NK.bitwise_and_((1 << INDEX_BITS) - 1)


def nucleus(sorted_NK: Tensor, top_p: float, total_N1: Tensor) -> Tensor:
    """`sorted_NK` with 0 for entries outside the nucleus: the fewest from the left whose sum reaches `top_p` of the total [N, 1]."""
    running_NK = sorted_NK.cumsum(-1)
    before_NK = torch.cat([torch.zeros_like(running_NK[:, :1]), running_NK[:, :-1]], dim=1)
    return sorted_NK.where(before_NK < top_p * total_N1, 0.0)


def wider_than(sorted_NK: Tensor, top_p: float, total_N1: Tensor) -> Tensor:
    """Which rows' nucleus would take in an entry after these, bool [N]."""
    return sorted_NK.cumsum(-1)[:, -1] < top_p * total_N1[:, 0]


def _smallest(keys_NV: Tensor, count: int) -> Tensor:
    """In rising order; the keys are overwritten. On CPUs by numpy's vectorised sorts, ten times as fast as torch's."""
    if keys_NV.device.type != "cpu":
        if count < keys_NV.shape[1]:
            return keys_NV.topk(count, dim=-1, largest=False, sorted=True).values
        return keys_NV.sort(dim=-1).values
    keys = keys_NV.numpy()
    if count < keys.shape[1]:
        keys.partition(count - 1, axis=-1)
    return torch.from_numpy(np.sort(keys[:, :count], axis=-1))
