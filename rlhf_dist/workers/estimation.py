"""From the pieces of a scored shard to token rewards, advantages and returns (NUMERICS §1, §2)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_dist.algos.advantages import broadcast_to_tokens, gae, grpo, reinforce, rloo
from rlhf_dist.algos.importance import importance_weights
from rlhf_dist.algos.kl import k3
from rlhf_dist.algos.losses import log_ratio
from rlhf_dist.algos.masking import masked
from rlhf_dist.algos.token_rewards import sequence_returns, token_rewards
from rlhf_dist.algos.whitening import masked_moments, whiten
from rlhf_dist.config.algorithm import AlgorithmSection
from rlhf_dist.contracts.experience import ExperienceBatch, Piece, StopReason, merge_pieces
from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.moments import Moments
from rlhf_dist.contracts.roles import EstimateRequest, ExperienceInfo
from rlhf_dist.contracts.tally import Tally


@dataclass(frozen=True)
class Scored:
    """A shard with its pieces in place: k1 per token (nats, 0 in masked slots) and the sequence score of each row."""

    batch: ExperienceBatch
    kl_BT: Tensor
    score_B: Tensor


class Estimator:
    """Advantages of a shard. Shards hold whole groups, so no estimator needs another shard; moments are merged by the coordinator.

    Args:
        config: estimator and its settings.
        samples_per_prompt: rows of a group.
        importance_cap: of the weights that the policy loss uses, which are shown here; None where it uses none.
    """

    def __init__(self, config: AlgorithmSection, samples_per_prompt: int, importance_cap: float | None = None) -> None:
        self._kind = config.estimator
        self._gamma, self._lam = config.gamma, config.lam
        self._bootstraps = config.truncated == "bootstrap"
        self._group_size = samples_per_prompt
        self._recomputed = config.old_logprobs == "recompute"
        self._importance_cap = importance_cap

    def __call__(
        self, request: EstimateRequest, shard: ExperienceBatch, pieces: Sequence[Piece]
    ) -> Stored[ExperienceBatch, ExperienceInfo]:
        """Merges pieces, leaves out dropped rows, computes advantages (not whitened) and returns."""
        began = time.perf_counter()
        scored = _scored(request, shard, pieces)
        advantages_BT, returns_BT, token_moments = self._advantages(scored, request)
        batch = scored.batch.replace(advantages_BT=advantages_BT, returns_BT=returns_BT, score_B=scored.score_B)
        tally = experience_metrics(scored, request.kl_coef)
        if self._recomputed:  # old log-probs that are the sampler's have no gap to it
            tally.merge(behaviour_metrics(batch, self._importance_cap))
        info = ExperienceInfo(
            prompt_lengths=_ints(batch.prompt_lengths_B),
            response_lengths=_ints(batch.response_lengths_B),
            valid_tokens=_ints(batch.valid_tokens_B),
            kl=tuple(scored.kl_BT.double().sum(1).tolist()),
            advantages=masked_moments(advantages_BT, batch.response_mask_BT),
            token_rewards=token_moments,
            tally=tally,
            seconds=time.perf_counter() - began,
        )
        return Stored(batch, info)

    def _advantages(self, scored: Scored, request: EstimateRequest) -> tuple[Tensor, Tensor, Moments]:
        batch, mask_BT = scored.batch, scored.batch.response_mask_BT
        if self._kind != "gae":
            returns_B = sequence_returns(scored.score_B, scored.kl_BT, mask_BT, request.kl_coef)
            advantage_B = self._sequence_advantages(returns_B, request.baseline)
            return broadcast_to_tokens(advantage_B, mask_BT), broadcast_to_tokens(returns_B, mask_BT), Moments()
        assert batch.values_BT is not None and batch.bootstrap_value_B is not None
        cut_B = batch.stop_reason_B == StopReason.LENGTH if self._bootstraps else torch.zeros(len(batch), dtype=torch.bool)
        rewards_BT = token_rewards(torch.where(cut_B, 0.0, scored.score_B), scored.kl_BT, mask_BT, request.kl_coef)
        moments = masked_moments(rewards_BT, mask_BT)
        if request.reward_moments is not None:
            rewards_BT = whiten(rewards_BT, mask_BT, request.reward_moments, keep_mean=True)
        bootstrap_B = torch.where(cut_B, batch.bootstrap_value_B, 0.0)
        return *gae(rewards_BT, batch.values_BT, mask_BT, gamma=self._gamma, lam=self._lam, bootstrap_B=bootstrap_B), moments

    def _sequence_advantages(self, returns_B: Tensor, baseline: float) -> Tensor:
        groups_B = torch.arange(len(returns_B)) // self._group_size
        if self._kind == "rloo":
            return rloo(returns_B, groups_B)
        if self._kind == "grpo":
            return grpo(returns_B, groups_B)
        return reinforce(returns_B, baseline)


def experience_metrics(scored: Scored, kl_coef: float) -> Tally:
    """The `objective/*` and `val/*` metrics of a shard, as exact sums."""
    batch, mask_BT = scored.batch, scored.batch.response_mask_BT
    assert batch.old_logprobs_BT is not None
    tally = Tally()
    kl_B = scored.kl_BT.double().sum(1)
    rows, penalty = len(batch), -kl_coef * kl_B
    tally.add("objective/kl", float(kl_B.sum()), rows)
    tally.add("objective/entropy", -float(masked(batch.old_logprobs_BT, mask_BT).double().sum()), rows)
    tally.add("objective/non_score_reward", float(penalty.sum()), rows)
    tally.add("objective/rlhf_reward", float((penalty + scored.score_B.double()).sum()), rows)
    tally.add("val/response_length", float(batch.response_lengths_B.sum()), rows)
    return tally


def behaviour_metrics(batch: ExperienceBatch, importance_cap: float | None) -> Tally:
    """How far the policy that sampled is from the one that trains, a token, as exact sums: by precision, and by staleness.

    `val/behaviour_kl`: KL(behaviour‖old) in nats (k3). Where weights are used, `val/importance_weight` and `val/importance_truncated`: the
    mean weight, and the share of tokens whose weight the cap set.
    """
    assert batch.old_logprobs_BT is not None
    old_BT, sampled_BT, mask_BT = batch.old_logprobs_BT.double(), batch.rollout_logprobs_BT.double(), batch.response_mask_BT
    tally, tokens = Tally(), float(mask_BT.sum())
    gap_BT = rollout_gap(batch)
    tally.add("val/rollout_logprob_gap", float(gap_BT.sum()), tokens)
    tally.add("val/behaviour_kl", float(masked(k3(log_ratio(sampled_BT, old_BT, mask_BT)), mask_BT).sum()), tokens)
    if bool(mask_BT.any()):
        tally.peak("val/rollout_logprob_gap_max", float(gap_BT.max()))
    if importance_cap is not None:
        importance = importance_weights(old_BT, sampled_BT, mask_BT, importance_cap)
        tally.add("val/importance_weight", float(importance.weights_BT.sum()), tokens)
        tally.add("val/importance_truncated", float(importance.truncated_BT.sum()), tokens)
    return tally


def token_kl(batch: ExperienceBatch) -> Tensor:
    """k1 = log π_old − log π_ref per token in nats, 0 in masked slots; float [B, T]."""
    assert batch.old_logprobs_BT is not None and batch.ref_logprobs_BT is not None
    return masked(batch.old_logprobs_BT, batch.response_mask_BT) - masked(batch.ref_logprobs_BT, batch.response_mask_BT)


def on_policy_gaps(batch: ExperienceBatch, fresh_logprobs_BT: Tensor, tally: Tally) -> None:
    """Counts what law 3 says is nothing: |ρ − 1|, the gap between sampler and trainer, |k1| to the reference."""
    assert batch.old_logprobs_BT is not None
    valid = batch.response_mask_BT
    gaps = {
        "ratio": (fresh_logprobs_BT[valid].double() - batch.old_logprobs_BT[valid].double()).exp().sub(1).abs(),
        "sampler": (batch.rollout_logprobs_BT[valid].double() - batch.old_logprobs_BT[valid].double()).abs(),
        "reference": token_kl(batch)[valid].double().abs(),
    }
    for name, gap in gaps.items():
        tally.add(f"{name}/mean", float(gap.sum()), gap.numel())
        tally.peak(f"{name}/max", float(gap.max()))


def rollout_gap(batch: ExperienceBatch) -> Tensor:
    """|log π_old − log π_sampler| per token, 0 in masked slots; double [B, T]."""
    assert batch.old_logprobs_BT is not None
    mask_BT = batch.response_mask_BT
    return (masked(batch.old_logprobs_BT, mask_BT).double() - masked(batch.rollout_logprobs_BT, mask_BT).double()).abs()


def _scored(request: EstimateRequest, shard: ExperienceBatch, pieces: Sequence[Piece]) -> Scored:
    keep = [row for row, kept in enumerate(request.keep) if kept]
    batch = merge_pieces(shard, pieces).select(keep)
    return Scored(batch, token_kl(batch), torch.tensor([request.scores[row] for row in keep], dtype=torch.float32))


def _ints(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.tolist())
