"""Direct preference optimisation and its family, per pair (NUMERICS section 3; Rafailov et al. 2023, arXiv 2305.18290).

h = Δ_chosen − Δ_rejected, where Δ is the log-ratio of a completion to the reference: summed over its tokens, for IPO averaged.
Losses are [B], one a pair, with gradient; callers sum them and divide by the global weight of the pairs.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from rlhf_dist.algos.masking import masked


def sequence_logprob(logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log π of each completion, Σ over its tokens, in nats, float64 [B]: of long completions, float32 would lose the sixth digit.

    Raises:
        ValueError: an empty completion; the data layer rejects those, with a count.
    """
    tokens_B = mask_BT.sum(1)
    if bool((tokens_B == 0).any()):
        raise ValueError(f"{int((tokens_B == 0).sum())} of {len(tokens_B)} completions have no tokens")
    return masked(logprobs_BT, mask_BT).double().sum(1)


def sequence_log_ratio(logprobs_BT: Tensor, mask_BT: Tensor, ref_logprob_B: Tensor, average: bool = False) -> Tensor:
    """Δ = log π − log π_ref of each completion, in nats, float64 [B]; per token when `average` (IPO).

    Args:
        logprobs_BT: of the policy. mask_BT: completion tokens. ref_logprob_B: the reference's `sequence_logprob`.

    Raises:
        ValueError: an empty completion.
    """
    delta_B = sequence_logprob(logprobs_BT, mask_BT) - ref_logprob_B
    return delta_B / mask_BT.sum(1) if average else delta_B


def sigmoid_loss(h_B: Tensor, beta: float, label_smoothing: float | Tensor = 0.0) -> Tensor:
    """DPO: −log σ(βh). With ε = label_smoothing, conservative DPO: −(1−ε) log σ(βh) − ε log σ(−βh).

    The smoothed form rests at βh = log((1−ε)/ε). The `(1−ε)·loss + ε·0.5` of some tutorials only rescales the gradient.

    Args:
        h_B: differences of log-ratios.
        beta: their scale.
        label_smoothing: ε below 0.5; or [B], one a pair, where 0.5 is a tie.

    Raises:
        ValueError: ε outside [0, 0.5), or outside [0, 0.5] for a pair.
    """
    epsilon = _checked_each(label_smoothing) if isinstance(label_smoothing, Tensor) else _checked(label_smoothing)
    return -(1.0 - epsilon) * logsigmoid(beta * h_B) - epsilon * logsigmoid(-beta * h_B)


def robust_loss(h_B: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """[−(1−ε) log σ(βh) + ε log σ(−βh)] / (1 − 2ε): unbiased when a share ε of the labels is flipped (arXiv 2403.00409).

    Raises:
        ValueError: ε outside [0, 0.5).
    """
    epsilon = _checked(label_smoothing)
    return (-(1.0 - epsilon) * logsigmoid(beta * h_B) + epsilon * logsigmoid(-beta * h_B)) / (1.0 - 2.0 * epsilon)


def hinge_loss(h_B: Tensor, beta: float) -> Tensor:
    """relu(1 − βh) (SLiC, arXiv 2305.10425)."""
    return relu(1.0 - beta * h_B)


def ipo_loss(h_B: Tensor, beta: float) -> Tensor:
    """(h − 1/(2β))² with h of *averaged* log-ratios (arXiv 2310.12036): it aims at a finite margin."""
    return (h_B - 1.0 / (2.0 * beta)).square()


def _checked(label_smoothing: float) -> float:
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label smoothing is the share of flipped labels, in [0, 0.5): {label_smoothing}")
    return label_smoothing


def _checked_each(label_smoothing_B: Tensor) -> Tensor:
    if not bool(((label_smoothing_B >= 0) & (label_smoothing_B <= 0.5)).all()):
        raise ValueError(f"label smoothing of a pair is the probability of a flipped label, in [0, 0.5]: {label_smoothing_B.tolist()}")
    return label_smoothing_B
