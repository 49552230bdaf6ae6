"""Shards on their way through a step: which prompts each holds, its handle, what was computed of it. References only, no tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from rlhf_dist.contracts.group import Handle, WorkerGroup
from rlhf_dist.contracts.roles import (
    GenerateRequest,
    PieceInfo,
    PolicyRole,
    RewardRole,
    RolloutInfo,
    SamplingRole,
    ScoreInfo,
    ScoringRole,
    Stream,
)
from rlhf_dist.coordinator.colocation import Turns

JUDGED, REFERENCE = "reward", "reference"
"""Whom a shard was asked of."""


@dataclass(frozen=True)
class Groups:
    """The worker groups of a run. None: the reference with LoRA, the value model without GAE, rollout where the policy samples itself.

    turn: who may be on the devices; by itself everyone.
    """

    policy: WorkerGroup
    reward: WorkerGroup
    reference: WorkerGroup | None = None
    value: WorkerGroup | None = None
    rollout: WorkerGroup | None = None
    turn: Turns = field(default_factory=Turns)

    @property
    def sampler(self) -> WorkerGroup:
        """The group that samples (contracts.roles.SamplingRole)."""
        return self.policy if self.rollout is None else self.rollout

    def all(self) -> list[WorkerGroup]:
        """The groups that exist."""
        return [group for group in (self.policy, self.reward, self.reference, self.value, self.rollout) if group is not None]

    def trained(self) -> list[WorkerGroup]:
        """The groups that take optimizer steps: the policy, and the value model where there is one."""
        return [group for group in (self.policy, self.value) if group is not None]

    def bytes_moved(self) -> int:
        """What passed between coordinator and workers so far (law 7: it grows with samples, never with tokens)."""
        return sum(getattr(group, "bytes_sent", 0) + getattr(group, "bytes_received", 0) for group in self.all())


@dataclass(frozen=True)
class Batch:
    """Which prompts to sample: `count` prompts of a stream from position `start`, `samples` completions each."""

    stream: Stream
    step: int
    start: int
    count: int
    samples: int
    max_new_tokens: int | None = None


@dataclass
class Shard:
    """One rank's rollouts. asked: what each group was asked about it, by name; a group is asked once, and again only if that was lost.

    stream, step: what it was sampled for.
    """

    rollouts: Handle
    stream: Stream = "train"
    step: int | None = None
    asked: dict[str, list[Handle]] = field(default_factory=dict)
    info: RolloutInfo | None = None
    scores: list[ScoreInfo] = field(default_factory=list)
    scored: list[PieceInfo] = field(default_factory=list)

    @property
    def pieces(self) -> list[Handle]:
        """What the engines computed of it."""
        return [handle for name, handles in self.asked.items() if name != JUDGED for handle in handles]

    @property
    def judged(self) -> list[Handle]:
        """What the rewards say of it."""
        return self.asked.get(JUDGED, [])

    def ask(self, name: str, group: WorkerGroup, method: Callable[..., object], *besides: object) -> None:
        """Asks all ranks of a group, unless that was done."""
        if name not in self.asked:
            self.asked[name] = group.submit(method, [(self.rollouts, *besides)] * group.world_size)

    @property
    def rows(self) -> int:
        """Samples in the shard; known once the rollouts were collected."""
        assert self.info is not None
        return len(self.info.prompt_ids)


def cut_prompts(start: int, count: int, parts: int) -> list[tuple[int, int]]:
    """Contiguous ranges (start, count) that differ by at most one prompt: the order of all rows does not depend on `parts`."""
    bounds = [start + count * part // parts for part in range(parts + 1)]
    return [(low, high - low) for low, high in pairwise(bounds)]


def generate(sampler: WorkerGroup, batch: Batch, version: int, shards_per_rank: int) -> list[Shard]:
    """Asks every rank for its shards, fixed before generation starts. Does not wait."""
    cuts = cut_prompts(batch.start, batch.count, sampler.world_size * shards_per_rank)
    requests = [
        GenerateRequest(batch.stream, batch.step, batch.start, low, count, batch.samples, version, batch.max_new_tokens)
        for low, count in cuts
    ]
    rounds = []
    for number in range(shards_per_rank):  # rank r holds the contiguous shards r·k to r·k + k − 1
        rounds.append(sampler.submit(SamplingRole.generate, [(request,) for request in requests[number::shards_per_rank]]))
    return [
        Shard(rounds[number][rank], batch.stream, batch.step) for rank in range(sampler.world_size) for number in range(shards_per_rank)
    ]


def score(groups: Groups, shards: Sequence[Shard], *, with_value: bool) -> None:
    """Asks all engines to score shards that are judged by the policy that made them (evaluation, preflight). Does not wait."""
    score_frozen(groups, shards)
    score_trained(groups, shards, with_value=with_value)


def score_frozen(groups: Groups, shards: Sequence[Shard]) -> None:
    """Asks reference and rewards, which stay as they are: they may score long before the shard is trained on. Does not wait.

    Each begins as soon as a shard is there and the engine is free; where groups take turns, with all shards of one before the next.
    """
    if groups.reference is not None:
        groups.turn(groups.reference)
        for shard in shards:
            shard.ask(REFERENCE, groups.reference, ScoringRole.score)
    groups.turn(groups.reward)
    for shard in shards:
        shard.ask(JUDGED, groups.reward, RewardRole.judge, shard.stream, shard.step)


def score_trained(groups: Groups, shards: Sequence[Shard], *, with_value: bool = True, with_policy: bool = True) -> None:
    """Asks value model and policy, which learn: what they say of a shard is of the version that trains on it. Does not wait.

    With LoRA the policy speaks for the reference too; it is asked here, since it may be busy with the step before.

    Args:
        with_value: also ask the value model. with_policy: also recompute the policy's own log-probs.
    """
    if with_value and groups.value is not None:
        groups.turn(groups.value)
        for shard in shards:
            shard.ask("value", groups.value, ScoringRole.score)
    if with_policy or groups.reference is None:
        groups.turn(groups.policy)
    for shard in shards:  # where the policy samples, it is busy until the last shard is done
        if with_policy:
            shard.ask("policy", groups.policy, ScoringRole.score)
        if groups.reference is None:
            shard.ask("adapter off", groups.policy, PolicyRole.reference_score)


def sampling_seconds(shards: Sequence[Shard], ranks: int) -> float:
    """What sampling took by the samplers' own clocks, on the rank that took longest; other work may have run meanwhile."""
    seconds = [shard.info.seconds for shard in shards if shard.info is not None]
    each = len(seconds) // ranks  # a rank's shards follow each other (`generate`)
    return max(sum(seconds[rank * each : (rank + 1) * each]) for rank in range(ranks))


def collect_rollouts(sampler: WorkerGroup, shards: Sequence[Shard]) -> int:
    """Waits for generation; returns the response tokens sampled."""
    infos: list[RolloutInfo] = sampler.collect([shard.rollouts for shard in shards])
    for shard, info in zip(shards, infos, strict=True):
        shard.info = info
    return sum(n for info in infos for n in info.response_lengths)


def collect_scores(groups: Groups, shards: Sequence[Shard]) -> None:
    """Waits for rewards and for all pieces."""
    for shard in shards:
        shard.scores = groups.reward.collect(shard.judged)
    for shard in shards:
        shard.scored = groups.policy.collect(shard.pieces)
