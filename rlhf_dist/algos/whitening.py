"""Whitening over the valid tokens of the global batch (NUMERICS section 1). `Moments` merges the local moments of shards and ranks."""

from __future__ import annotations

from torch import Tensor

from rlhf_dist.algos.masking import masked
from rlhf_dist.contracts.moments import Moments

EPSILON = 1e-8  # added to the variance


def masked_moments(x_BT: Tensor, mask_BT: Tensor) -> Moments:
    """Count, mean and squared deviation of the valid slots, in double precision. Merge them over all shards before whitening."""
    values = x_BT.detach()[mask_BT].double()
    if not values.numel():
        return Moments()
    mean = values.mean()
    return Moments(values.numel(), float(mean), float((values - mean).square().sum()))


def whiten(x_BT: Tensor, mask_BT: Tensor, moments: Moments, keep_mean: bool = False) -> Tensor:
    """(x − μ) · rsqrt(σ² + 1e-8) with the unbiased variance, 0 in masked slots; in the dtype of `x_BT`.

    Args:
        x_BT: advantages (centred) or token rewards (`keep_mean`).
        mask_BT: valid tokens.
        moments: of the whole batch, over all ranks.
        keep_mean: add μ back, so that only the scale changes.

    Raises:
        ValueError: the whole batch has fewer than two valid tokens.
    """
    scale = (moments.variance + EPSILON) ** -0.5
    centred_BT = (masked(x_BT, mask_BT, moments.mean).double() - moments.mean) * scale
    return masked(centred_BT + moments.mean if keep_mean else centred_BT, mask_BT).to(x_BT.dtype)
