"""Estimators of KL(π‖π_ref) from samples of π, and the adaptive coefficient (NUMERICS section 1; Schulman 2020).

Δ = log π − log π_ref of the sampled token, in nats. Which one to use: k1 in the reward, k2 as a loss, k3 for display.
Mask the result (or Δ): these functions are elementwise.
"""

from __future__ import annotations

import math

from torch import Tensor


def k1(delta: Tensor) -> Tensor:
    """Δ: unbiased, of either sign. For the reward (with γ = 1 and Monte-Carlo returns it gives the true ∇KL).

    Not for a loss: its expected gradient is zero.
    """
    return delta


def k2(delta: Tensor) -> Tensor:
    """Δ²/2: never negative, biased in value. For a loss on samples of the current policy: k2 of the *sequence-summed* Δ has the true ∇KL.

    Per token it leaves out what a token does to later states; in later epochs it needs weighting by the ratio.
    """
    return 0.5 * delta.square()


def k3(delta: Tensor) -> Tensor:
    """e^{−Δ} − 1 + Δ: unbiased, never negative, of low variance. For display.

    As a loss it follows the per-token ∇KL(π_ref‖π), the other direction; inside the reward it is biased.
    """
    return (-delta).expm1() + delta


def next_kl_coef(coef: float, observed_kl: float, episodes: int, target: float, horizon: int) -> float:
    """The adaptive controller of Ziegler et al. 2019 (arXiv 1909.08593): β (1 + e·n/horizon), e = clip(KL/target − 1, ±0.2).

    Args:
        coef: β so far.
        observed_kl: mean over sequences of Σ k1, in nats, over *all ranks*: from rank-local means β would drift apart.
        episodes: sequences in the update, over all ranks.
        target: KL per sequence aimed at, in nats.
        horizon: episodes over which the controller acts.

    Raises:
        ValueError: the observed KL is not finite.
    """
    if not math.isfinite(observed_kl):
        raise ValueError(f"the KL controller was given {observed_kl}; the log-probs it was measured from are broken")
    error = min(max(observed_kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * episodes / horizon)
