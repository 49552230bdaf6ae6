"""Held-out evaluation: the same prompts and the same random numbers every time, scored without learning anything."""

from __future__ import annotations

from rlhf_dist.contracts.roles import PolicyRole
from rlhf_dist.coordinator.judging import judge
from rlhf_dist.coordinator.shards import Batch, Groups, collect_rollouts, collect_scores, generate, score
from rlhf_dist.evaluation.held_out import EvaluationResult, HeldOutSamples, paired_differences, summarise
from rlhf_dist.rewards.mixture import RewardMixer
from rlhf_dist.runs.summary import HeldOut


def evaluate(groups: Groups, mixer: RewardMixer, batch: Batch, version: int, path: str) -> HeldOutSamples:
    """Samples the held-out prompts, scores them, writes them to `path`.

    Args:
        groups: the run's workers.
        mixer: its moments are used, not updated.
        batch: all held-out prompts.
        version: of the policy that is evaluated.
        path: Parquet file, written by the policy's rank 0.
    """
    shards = generate(groups.policy, batch, version, 1)
    score(groups, shards, with_value=False)
    collect_rollouts(groups.policy, shards)
    collect_scores(groups, shards)
    judged = judge(mixer, shards, batch.samples, update=False)
    details = [judged.of(shards, index).details() for index in range(len(shards))]
    given = (path, [shard.rollouts for shard in shards], [shard.pieces for shard in shards], details)
    written = groups.policy.collect(groups.policy.submit(PolicyRole.write_rollouts, [given] * groups.policy.world_size))[0]
    infos = [shard.info for shard in shards if shard.info is not None]
    return HeldOutSamples(
        prompt_ids=[n for info in infos for n in info.prompt_ids],
        scores=[s if kept else None for s, kept in zip(judged.scores, judged.keep, strict=True)],
        rewards=judged.raw,
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

    def summary(self, best_score: float | None, best_step: int | None) -> HeldOut | None:
        """Before, after and their paired difference; None without an evaluation."""
        if self._first is None or self._latest is None:
            return None
        difference = {name: interval.to_dict() for name, interval in paired_differences(self._first, self._latest).items()}
        return HeldOut(summarise(self._first).to_dict(), summarise(self._latest).to_dict(), difference, best_score, best_step)
