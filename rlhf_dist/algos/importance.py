"""Weights for samples of another policy than the one that trains: an older version of it, or the same weights in other numerics.

Decoupled PPO (Hilton et al. 2021, arXiv 2110.00641; AReaL, arXiv 2505.24298) knows three policies: the one that sampled (behaviour), the
one at the start of the step (proximal, our old log-probs), and the one being trained. The clip bounds ρ = π / π_prox, so that a step
goes as far as on fresh samples; and w = π_prox / π_behaviour, a constant to the gradient, makes the expectation over samples one over the
proximal policy. Truncated at a cap, w weighs too little what the samples hold too little of, and its variance is bounded.

w looks at one token at a time: at the first token of a completion it is exact, further on the prefixes stay those of the behaviour policy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from rlhf_dist.algos.losses import log_ratio
from rlhf_dist.algos.masking import masked


@dataclass(frozen=True)
class ImportanceWeights:
    """weights_BT without gradient, in (0, cap], 0 in masked slots; truncated_BT bool, True where the cap set the weight."""

    weights_BT: Tensor
    truncated_BT: Tensor


def importance_weights(prox_logprobs_BT: Tensor, behaviour_logprobs_BT: Tensor, mask_BT: Tensor, cap: float) -> ImportanceWeights:
    """min(π_prox / π_behaviour, cap) of each token.

    Args:
        prox_logprobs_BT: of the policy at the start of the step, by the trainer, in nats.
        behaviour_logprobs_BT: of the policy that sampled, as it saw them, in nats.
        mask_BT: tokens that count.
        cap: largest weight, at least 1.
    """
    delta_BT = log_ratio(prox_logprobs_BT, behaviour_logprobs_BT, mask_BT).detach()
    weights_BT = delta_BT.clamp(max=math.log(cap)).exp()  # clamped first: a ratio that overflows is a cap, not infinity
    return ImportanceWeights(masked(weights_BT, mask_BT), (delta_BT > math.log(cap)) & mask_BT)
