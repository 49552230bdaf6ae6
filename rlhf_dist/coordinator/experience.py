"""From scored shards to the step's experience: rewards and advantages on the policy workers, moments merged here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_dist.contracts.group import Handle, WorkerGroup
from rlhf_dist.contracts.moments import Moments, merged_moments
from rlhf_dist.contracts.roles import EstimateRequest, ExperienceInfo, PolicyRole
from rlhf_dist.contracts.tally import Tally, merged
from rlhf_dist.coordinator.judging import Judged
from rlhf_dist.coordinator.shards import Shard, cut_prompts


@dataclass(frozen=True)
class Experience:
    """A step's experience by reference, with one number a row of what the schedule needs.

    lengths: prompt + response tokens; valid_tokens: trained tokens; kl: Σ k1 in nats; advantages: merged moments.
    """

    handles: tuple[Handle, ...]
    lengths: tuple[int, ...]
    valid_tokens: tuple[int, ...]
    kl: tuple[float, ...]
    advantages: Moments
    tally: Tally


@dataclass(frozen=True)
class Coefficients:
    """β of the KL penalty, and the baseline of `reinforce`."""

    kl: float
    baseline: float


def estimate(
    policy: WorkerGroup, shards: Sequence[Shard], judged: Judged, coefficients: Coefficients, *, whiten_rewards: bool
) -> Experience:
    """Estimates advantages shard by shard. Whitened rewards need the moments of all shards first, hence a second pass then."""
    parts = [judged.of(shards, index) for index in range(len(shards))]
    handles, infos = _ask(policy, shards, [_request(part, coefficients, None) for part in parts])
    if whiten_rewards:
        moments = merged_moments(info.token_rewards for info in infos)
        handles, infos = _ask(policy, shards, [_request(part, coefficients, moments) for part in parts])
    return Experience(
        handles=tuple(handles),
        lengths=tuple(p + r for info in infos for p, r in zip(info.prompt_lengths, info.response_lengths, strict=True)),
        valid_tokens=tuple(n for info in infos for n in info.valid_tokens),
        kl=tuple(k for info in infos for k in info.kl),
        advantages=merged_moments(info.advantages for info in infos),
        tally=merged(info.tally for info in infos),
    )


def _request(part: Judged, coefficients: Coefficients, moments: Moments | None) -> EstimateRequest:
    return EstimateRequest(part.scores, part.raw, part.keep, coefficients.kl, coefficients.baseline, moments)


def _ask(policy: WorkerGroup, shards: Sequence[Shard], requests: Sequence[EstimateRequest]) -> tuple[list[Handle], list[ExperienceInfo]]:
    """Contiguous runs of shards go to each rank (where the policy sampled, those it sampled itself); answers come back in shard order."""
    runs = [range(start, start + count) for start, count in cut_prompts(0, len(shards), policy.world_size)]
    handles: dict[int, Handle] = {}
    for number in range(max(map(len, runs))):
        asked = [run[number] if number < len(run) else None for run in runs]
        given = [None if i is None else (requests[i], shards[i].rollouts, shards[i].pieces) for i in asked]
        answers = policy.submit(PolicyRole.estimate, given)
        handles |= dict(zip((i for i in asked if i is not None), answers, strict=True))
    in_order = [handles[index] for index in range(len(shards))]
    return in_order, policy.collect(in_order)
