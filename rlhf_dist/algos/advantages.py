"""Advantage estimators: GAE on tokens; REINFORCE, RLOO and GRPO on whole sequences (NUMERICS sections 1 and 2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_dist.algos.masking import masked
from rlhf_dist.algos.whitening import EPSILON


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float, bootstrap_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438) over the tokens that the policy chose.

    δ[t] = r[t] + γ V[t⁺] − V[t] and A[t] = δ[t] + γλ A[t⁺], where t⁺ is the *next valid* token: the recursion jumps gaps in the mask
    (tool and environment tokens) and does not decay inside them.

    Args:
        rewards_BT, values_BT: token rewards, and values of the state before each token.
        mask_BT: valid tokens; what stands in the other slots does not matter.
        gamma, lam: discount and λ.
        bootstrap_B: value after the last valid token; None or 0 where the episode ended there.

    Returns:
        advantages_BT (not whitened) and returns_BT = A + V, both 0 in masked slots.
    """
    rewards_BT, values_BT = masked(rewards_BT, mask_BT), masked(values_BT, mask_BT)
    advantage_B = values_BT.new_zeros(len(values_BT))
    next_value_B = torch.zeros_like(advantage_B) if bootstrap_B is None else bootstrap_B.to(values_BT.dtype)
    backwards = []
    for t in reversed(range(mask_BT.shape[1])):
        valid_B = mask_BT[:, t]
        here_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t] + gamma * lam * advantage_B
        advantage_B = torch.where(valid_B, here_B, advantage_B)
        next_value_B = torch.where(valid_B, values_BT[:, t], next_value_B)
        backwards.append(advantage_B)
    advantages_BT = masked(torch.stack(backwards[::-1], 1), mask_BT) if backwards else torch.zeros_like(values_BT)
    return advantages_BT, advantages_BT + values_BT


def reinforce(returns_B: Tensor, baseline: float) -> Tensor:
    """R − b with one baseline for the batch (Williams 1992), see `next_baseline`; float [B]."""
    return returns_B - baseline


def rloo(returns_B: Tensor, groups_B: Tensor) -> Tensor:
    """R minus the mean of the *other* samples of the prompt (Ahmadian et al. 2024, arXiv 2402.14740); float [B].

    Args:
        returns_B: R of each sequence.
        groups_B: int64 [B], equal for samples of one prompt; any numbers, in any order.

    Raises:
        ValueError: a group of one has no others to compare with.
    """
    size_B, mean_B, _ = _group_moments(returns_B, groups_B)
    return ((returns_B.double() - mean_B) * size_B / (size_B - 1)).to(returns_B.dtype)


def grpo(returns_B: Tensor, groups_B: Tensor) -> Tensor:
    """(R − mean) · rsqrt(var + 1e-8) within the samples of the prompt, unbiased variance (Shao et al. 2024, arXiv 2402.03300); float [B].

    Args, raises: as `rloo`.
    """
    _, mean_B, variance_B = _group_moments(returns_B, groups_B)
    return ((returns_B.double() - mean_B) * torch.rsqrt(variance_B + EPSILON)).to(returns_B.dtype)


def broadcast_to_tokens(advantage_B: Tensor, mask_BT: Tensor) -> Tensor:
    """A sequence's advantage on each of its valid tokens, 0 elsewhere; float [B, T]."""
    return masked(advantage_B.unsqueeze(1).expand(mask_BT.shape), mask_BT)


def next_baseline(baseline: float | None, mean_return: float, momentum: float) -> float:
    """Running mean of the returns; the first call (None) takes the mean itself. The mean is over all ranks.

    Raises:
        ValueError: the mean return is not finite.
    """
    if not math.isfinite(mean_return):
        raise ValueError(f"the baseline was given a mean return of {mean_return}")
    return mean_return if baseline is None else momentum * baseline + (1.0 - momentum) * mean_return


def _group_moments(returns_B: Tensor, groups_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Size, mean and unbiased variance of each row's group, float64 [B] each."""
    ids, index_B, sizes_G = torch.unique(groups_B, return_inverse=True, return_counts=True)
    if bool((sizes_G < 2).any()):
        alone = ids[sizes_G < 2]
        raise ValueError(
            f"{len(alone)} groups have a single sample (first: group {int(alone[0])}); comparing samples of a prompt needs two"
        )
    returns = returns_B.double()
    zeros_G = torch.zeros(len(ids), dtype=torch.float64, device=returns.device)
    mean_B = (zeros_G.index_add(0, index_B, returns) / sizes_G)[index_B]
    variance_G = zeros_G.index_add(0, index_B, (returns - mean_B).square()) / (sizes_G - 1)
    return sizes_G[index_B].double(), mean_B, variance_G[index_B]
