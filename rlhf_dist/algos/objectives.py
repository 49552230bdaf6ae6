"""The losses of the policy and the value engine on a microbatch, with their metrics (`contracts.engine.Objective`).

Metric names are those of TRL. All are sums over valid tokens with their number as weight, so they merge exactly over microbatches, ranks
and steps; an empty microbatch adds nothing to them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_dist.algos.importance import importance_weights
from rlhf_dist.algos.kl import k2
from rlhf_dist.algos.losses import PolicyClip, TokenLoss, log_ratio, policy_loss, token_weights, value_loss
from rlhf_dist.algos.masking import masked_sum
from rlhf_dist.config.algorithm import AlgorithmSection
from rlhf_dist.contracts.engine import Outputs
from rlhf_dist.contracts.experience import ExperienceBatch, SequenceBatch
from rlhf_dist.contracts.tally import Tally


class PolicyObjective:
    """Clipped surrogate minus the entropy bonus, on outputs `logprobs_BT` and `entropy_BT` (nats, at the sampling temperature).

    Reads old_logprobs_BT and advantages_BT (already whitened) of the microbatch, and rollout_logprobs_BT where tokens are weighted.

    Args:
        config: clip, entropy bonus, reduction.
        importance_cap: weigh the surrogate of each token by its truncated importance weight; None: the samples are the trainer's own.
    """

    def __init__(self, config: AlgorithmSection, importance_cap: float | None = None) -> None:
        self._clip = PolicyClip(config.clip_low, config.clip_high, config.dual_clip)
        self._entropy_coef = config.entropy_coef
        self._reduction = config.reduction
        self._importance_cap = importance_cap

    def __call__(self, outputs: Outputs, microbatch: SequenceBatch) -> tuple[Tensor, Tally]:
        """The loss summed with the weights of the reduction, and the metrics.

        Raises:
            TypeError: the microbatch is no experience.
            ValueError: a field it needs was not filled.
        """
        batch = _experience(microbatch)
        old_logprobs_BT, mask_BT = _filled(batch, "old_logprobs_BT"), batch.response_mask_BT
        weights_BT = token_weights(mask_BT, self._reduction)
        tokens = policy_loss(outputs["logprobs_BT"], old_logprobs_BT, _filled(batch, "advantages_BT"), mask_BT, self._clip)
        if self._importance_cap is not None:
            importance = importance_weights(old_logprobs_BT, batch.rollout_logprobs_BT, mask_BT, self._importance_cap)
            tokens = tokens.scaled(importance.weights_BT)
        loss = tokens.weighted_sum(weights_BT)
        if self._entropy_coef:
            loss = loss - self._entropy_coef * masked_sum(outputs["entropy_BT"] * weights_BT, mask_BT)
        return loss, self._metrics(outputs, old_logprobs_BT, tokens, weights_BT)

    @torch.no_grad()
    def _metrics(self, outputs: Outputs, old_logprobs_BT: Tensor, tokens: TokenLoss, weights_BT: Tensor) -> Tally:
        delta_BT = log_ratio(outputs["logprobs_BT"].double(), old_logprobs_BT.double(), tokens.mask_BT)
        ratio_BT = delta_BT.exp()
        per_token_BT = {
            "policy/approxkl_avg": k2(delta_BT),
            "policy/clipfrac_avg": tokens.clipped_BT,
            "policy/entropy_avg": outputs["entropy_BT"],
            "val/ratio": ratio_BT,
            "val/ratio_mean_deviation": (ratio_BT - 1.0).abs(),
        }
        tally = _averages(per_token_BT, tokens.mask_BT)
        _add_loss(tally, "loss/policy_avg", tokens, weights_BT)
        if bool(tokens.mask_BT.any()):
            tally.peak("val/ratio_max_deviation", float((ratio_BT - 1.0).abs()[tokens.mask_BT].amax()))
        return tally


class ValueObjective:
    """Clipped squared error of `values_BT` against returns_BT. Reads also values_BT of the microbatch, the old values.

    It follows the same reduction as the policy, so that one denominator serves both.
    """

    def __init__(self, config: AlgorithmSection) -> None:
        self._clip = config.value_clip
        self._reduction = config.reduction

    def __call__(self, outputs: Outputs, microbatch: SequenceBatch) -> tuple[Tensor, Tally]:
        """The loss summed with the weights of the reduction, and the metrics.

        Raises:
            TypeError: the microbatch is no experience.
            ValueError: a field it needs was not filled.
        """
        batch = _experience(microbatch)
        weights_BT = token_weights(batch.response_mask_BT, self._reduction)
        old_values_BT, returns_BT = _filled(batch, "values_BT"), _filled(batch, "returns_BT")
        tokens = value_loss(outputs["values_BT"], old_values_BT, returns_BT, batch.response_mask_BT, self._clip)
        with torch.no_grad():
            tally = _averages({"val/clipfrac_avg": tokens.clipped_BT}, tokens.mask_BT)
            _add_loss(tally, "loss/value_avg", tokens, weights_BT)
        return tokens.weighted_sum(weights_BT), tally


def _experience(microbatch: SequenceBatch) -> ExperienceBatch:
    if not isinstance(microbatch, ExperienceBatch):
        raise TypeError(f"PPO trains on ExperienceBatch, not on {type(microbatch).__name__}")
    return microbatch


def _filled(batch: ExperienceBatch, name: str) -> Tensor:
    tensor: Tensor | None = getattr(batch, name)
    if tensor is None:
        raise ValueError(f"{name} of the microbatch was not filled before training")
    return tensor


def _averages(per_token_BT: dict[str, Tensor], mask_BT: Tensor) -> Tally:
    """Sums over valid tokens in double precision, fetched from the device at once."""
    sums = [x_BT.detach()[mask_BT].double().sum() for x_BT in per_token_BT.values()]
    *totals, count = torch.stack([*sums, mask_BT.sum().double()]).tolist()
    tally = Tally()
    for name, total in zip(per_token_BT, totals, strict=True):
        tally.add(name, total, count)
    return tally


def _add_loss(tally: Tally, name: str, tokens: TokenLoss, weights_BT: Tensor) -> None:
    """The mean that the reduction takes: over tokens, or (`sequence_mean`) over sequences of their token means."""
    weights = weights_BT[tokens.mask_BT].double()
    tally.add(name, float((tokens.loss_BT.detach()[tokens.mask_BT].double() * weights).sum()), float(weights.sum()))
