"""The clipped losses of PPO per token, and how they are reduced (NUMERICS section 1; Schulman et al. 2017, arXiv 1707.06347).

Losses are *summed* with weights and divided once by a global denominator (`forward_backward`): then it does not matter how a batch
was cut into microbatches and ranks (law 2). A mean of means would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf_dist.algos.masking import masked, masked_sum

Reduction = Literal["token_mean", "sequence_mean", "fixed"]


@dataclass(frozen=True)
class PolicyClip:
    """Ratios count only in [1 − low, 1 + high]; `dual` (> 1) bounds the loss of negative advantages (Ye et al. 2020, arXiv 1912.09729)."""

    low: float
    high: float
    dual: float | None = None


@dataclass(frozen=True)
class TokenLoss:
    """loss_BT with gradient, 0 in masked slots; clipped_BT bool, True where the clip set the loss; mask_BT."""

    loss_BT: Tensor
    clipped_BT: Tensor
    mask_BT: Tensor

    def weighted_sum(self, weights_BT: Tensor) -> Tensor:
        """Σ w·loss, a scalar; without valid tokens a zero that still depends on the model's outputs."""
        return masked_sum(self.loss_BT * weights_BT, self.mask_BT)

    def scaled(self, weights_BT: Tensor) -> TokenLoss:
        """Each token's loss times a weight that takes part in no gradient, and is finite in masked slots too."""
        return dataclasses.replace(self, loss_BT=self.loss_BT * weights_BT)


def log_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log π − log π_old in nats, 0 (ratio 1) in masked slots."""
    return masked(logprobs_BT, mask_BT) - masked(old_logprobs_BT, mask_BT)


def policy_loss(logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, clip: PolicyClip) -> TokenLoss:
    """max(−A ρ, −A clip(ρ, 1 − low, 1 + high)), ρ = exp(log π − log π_old).

    With `clip.dual` = c, a token of negative advantage costs at most −A·c: an old sample that the policy now finds
    very likely cannot blow up the update.
    """
    ratio_BT = log_ratio(logprobs_BT, old_logprobs_BT, mask_BT).exp()
    advantages_BT = masked(advantages_BT, mask_BT)
    plain_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1.0 - clip.low, 1.0 + clip.high)
    loss_BT = torch.maximum(plain_BT, clipped_BT)
    if clip.dual is not None:
        loss_BT = torch.where(advantages_BT < 0, torch.minimum(loss_BT, -advantages_BT * clip.dual), loss_BT)
    return TokenLoss(masked(loss_BT, mask_BT), (clipped_BT > plain_BT) & mask_BT, mask_BT)


def value_loss(values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, clip: float | None) -> TokenLoss:
    """½ max((V − R)², (clip(V, V_old ± c) − R)²); without a clip ½ (V − R)²."""
    values_BT, returns_BT = masked(values_BT, mask_BT), masked(returns_BT, mask_BT)
    plain_BT = (values_BT - returns_BT).square()
    if clip is None:
        return TokenLoss(masked(0.5 * plain_BT, mask_BT), torch.zeros_like(mask_BT), mask_BT)
    old_values_BT = masked(old_values_BT, mask_BT)
    clipped_BT = (values_BT.clamp(old_values_BT - clip, old_values_BT + clip) - returns_BT).square()
    return TokenLoss(masked(0.5 * torch.maximum(plain_BT, clipped_BT), mask_BT), (clipped_BT > plain_BT) & mask_BT, mask_BT)


def token_weights(mask_BT: Tensor, reduction: Reduction) -> Tensor:
    """Weight of each token in the sum, float32 [B, T], 0 in masked slots: 1, or for `sequence_mean` 1 / valid tokens of the row."""
    weights_BT = mask_BT.float()
    if reduction == "sequence_mean":
        return weights_BT / mask_BT.sum(1, keepdim=True).clamp(min=1)
    return weights_BT


def denominator(valid_tokens: Sequence[int], reduction: Reduction, max_new_tokens: int) -> float:
    """What the weighted sum of one optimizer step is divided by, over all ranks and microbatches.

    `token_mean`: valid tokens. `sequence_mean`: sequences. `fixed`: sequences × max_new_tokens (Dr. GRPO, arXiv 2503.20783), which gives
    every token the same weight whatever the lengths. Sequences without a valid token are not counted: nothing of theirs is in the sum.

    Args:
        valid_tokens: of every sequence in the optimizer step, on all ranks.
        reduction: as given to `token_weights`.
        max_new_tokens: longest completion the rollout allows.

    Raises:
        ValueError: no valid tokens; there is nothing to train on.
    """
    sequences = sum(1 for tokens in valid_tokens if tokens > 0)
    if not sequences:
        raise ValueError(f"an optimizer step over {len(valid_tokens)} sequences has no valid token to train on")
    divisors = {"token_mean": sum(valid_tokens), "sequence_mean": sequences, "fixed": sequences * max_new_tokens}
    return float(divisors[reduction])
