"""Held-out evaluation: the same prompts, the same random numbers and the same yardstick every time; nothing is learnt from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rlhf_dist.config.rewards import RewardSection
from rlhf_dist.contracts.roles import PolicyRole
from rlhf_dist.coordinator.judging import Judged, judge
from rlhf_dist.coordinator.shards import Batch, Groups, Shard, collect_rollouts, collect_scores, generate, score
from rlhf_dist.evaluation.held_out import EvaluationResult, HeldOutSamples, paired_differences, summarise
from rlhf_dist.rewards.mixture import RewardMixer
from rlhf_dist.runs.summary import HeldOut


class Yardstick:
    """Mixes held-out rewards the same way in every evaluation.

    Training normalises a reward by moments that move on; held-out scores of two evaluations would then not compare. Here the moments are
    those of the first evaluation, for the whole run.

    Args:
        section: the `reward` section.
        max_new_tokens: the length limit.
    """

    def __init__(self, section: RewardSection, max_new_tokens: int) -> None:
        self._mixer = RewardMixer(section, max_new_tokens)
        self._fixed = False

    def judge(self, shards: Sequence[Shard], group_size: int) -> Judged:
        """Scores of all held-out rows (see `judging.judge`)."""
        judged = judge(self._mixer, shards, group_size, update=not self._fixed)
        self._fixed = True
        return judged

    def state_dict(self) -> dict[str, Any]:
        """The moments of the first evaluation, JSON-able; empty before it."""
        return dict(self._mixer.state_dict()) if self._fixed else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        if state:
            self._mixer.load_state_dict(state)
            self._fixed = True


def evaluate(groups: Groups, yardstick: Yardstick, batch: Batch, version: int, path: str) -> HeldOutSamples:
    """Samples the held-out prompts, scores them, writes them to `path`.

    Args:
        groups: the run's workers.
        yardstick: makes one score of the rewards.
        batch: all held-out prompts.
        version: of the policy that is evaluated.
        path: Parquet file, written by the policy's rank 0.
    """
    groups.turn(groups.sampler, needs="sampler")
    shards = generate(groups.sampler, batch, version, 1)
    score(groups, shards, with_value=False)
    collect_rollouts(groups.sampler, shards)
    collect_scores(groups, shards)
    judged = yardstick.judge(shards, 1)  # an abstention takes its own sample away, not those it is never compared with
    details = [judged.of(shards, index).details() for index in range(len(shards))]
    given = (path, [shard.rollouts for shard in shards], [shard.pieces for shard in shards], details)
    written = groups.policy.collect(groups.policy.submit(PolicyRole.write_rollouts, [given] * groups.policy.world_size))[0]
    infos = [shard.info for shard in shards if shard.info is not None]
    return HeldOutSamples(
        prompt_ids=[n for info in infos for n in info.prompt_ids],
        scores=[s if kept else None for s, kept in zip(judged.scores, judged.keep, strict=True)],
        rewards=judged.genuine,
        lengths=[n for info in infos for n in info.response_lengths],
        stop_reasons=[n for info in infos for n in info.stop_reasons],
        kl=written.kl,
    )


class HeldOutRecord:
    """The first and the latest evaluation of a run: what the summary compares."""

    def __init__(self) -> None:
        self._first: HeldOutSamples | None = None
        self._latest: HeldOutSamples | None = None

    def add(self, samples: HeldOutSamples) -> EvaluationResult:
        """Takes in an evaluation and summarises it."""
        self._first, self._latest = self._first or samples, samples
        return summarise(samples)

    def state_dict(self) -> dict[str, Any]:
        """Both, JSON-able; empty without an evaluation."""
        if self._first is None or self._latest is None:
            return {}
        return {"first": _plain(self._first), "latest": _plain(self._latest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        if state:
            self._first, self._latest = HeldOutSamples(**state["first"]), HeldOutSamples(**state["latest"])

    def summary(self, best_score: float | None, best_step: int | None) -> HeldOut | None:
        """Before, after and their paired difference; None without an evaluation."""
        if self._first is None or self._latest is None:
            return None
        difference = {name: interval.to_dict() for name, interval in paired_differences(self._first, self._latest).items()}
        return HeldOut(summarise(self._first).to_dict(), summarise(self._latest).to_dict(), difference, best_score, best_step)


def _plain(samples: HeldOutSamples) -> dict[str, Any]:
    """With lists for tuples, as JSON gives them back."""
    values = {field.name: getattr(samples, field.name) for field in dataclasses.fields(samples)}
    rewards = {name: list(column) for name, column in samples.rewards.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()} | {"rewards": rewards}
