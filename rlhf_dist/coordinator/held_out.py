"""Held-out evaluation: the same prompts and the same random numbers every time, scored without learning anything."""

from __future__ import annotations

from rlhf_dist.contracts.roles import PolicyRole
from rlhf_dist.coordinator.judging import judge
from rlhf_dist.coordinator.shards import Batch, Groups, collect_rollouts, collect_scores, generate, score
from rlhf_dist.evaluation.held_out import EvaluationResult, HeldOutSamples, summarise
from rlhf_dist.rewards.mixture import RewardMixer


def evaluate(groups: Groups, mixer: RewardMixer, batch: Batch, version: int, path: str) -> EvaluationResult:
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
    return summarise(
        HeldOutSamples(
            prompt_ids=[n for info in infos for n in info.prompt_ids],
            scores=[s if kept else None for s, kept in zip(judged.scores, judged.keep, strict=True)],
            rewards=judged.raw,
            lengths=[n for info in infos for n in info.response_lengths],
            stop_reasons=[n for info in infos for n in info.stop_reasons],
            kl=written.kl,
        )
    )
