from __future__ import annotations

from collections.abc import Callable

import pytest

from rlhf_dist.contracts.moments import Moments
from rlhf_dist.contracts.roles import PieceInfo
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.coordinator.experience import Experience
from rlhf_dist.coordinator.judging import Judged
from rlhf_dist.coordinator.outcome import StepOutcome
from rlhf_dist.coordinator.shards import Shard
from rlhf_dist.coordinator.update import UpdateReport
from rlhf_dist.runs.clock import Clock


def tally(name: str, total: float, weight: float) -> Tally:
    result = Tally()
    result.add(name, total, weight)
    return result


def outcome(sampled_shard: Callable[..., Shard]) -> StepOutcome:
    shards = [sampled_shard([2, 2], tally=tally("rollout/kept_mass", 1.8, 2)), sampled_shard([4], tally=tally("rollout/kept_mass", 0.3, 1))]
    judged = Judged((1.0, 2.0, 3.0), (True, False, True), {}, tally("rewards/r", 6.0, 3))
    experience = Experience((), (5, 7), (2, 4), (1.0, 4.0), Moments(), tally("objective/rlhf_reward", 3.0, 2))
    return StepOutcome(
        shards,
        judged,
        experience,
        UpdateReport({"lr/policy": 0.1}),
        Clock({"train": 2.0}, tokens=8),
        300,
        tally("rollout/staleness", 3.0, 3),
    )


def test_figures_are_of_all_ranks(sampled_shard: Callable[..., Shard]) -> None:
    step = outcome(sampled_shard)
    assert step.kl == 2.5  # the mean over sequences, not over shards
    assert step.episodes == 2
    assert step.mean_return == 1.5
    assert step.dropped == 1


def test_the_speed_of_scoring_is_that_of_all_ranks(sampled_shard: Callable[..., Shard]) -> None:
    """Operations over seconds, of every rank and shard together; nothing where nothing scored."""
    step, name = outcome(sampled_shard), "perf/value_score_tflops"
    assert name not in step.metrics()
    for shard, done, seconds in zip(step.shards, (6.0, 1.0), (2.0, 5.0), strict=True):
        shard.scored.append(PieceInfo((0,), seconds, tally(name, done, seconds)))
    assert step.metrics()[name] == 1.0


def test_metrics_of_every_part_meet(sampled_shard: Callable[..., Shard]) -> None:
    metrics = outcome(sampled_shard).metrics()
    assert metrics["rollout/kept_mass"] == pytest.approx(0.7)  # (0.9 + 0.9 + 0.3) / 3: merged by weight, not a mean of means
    assert metrics["rollout/staleness"] == 1.0
    assert metrics["rewards/r"] == 2.0
    assert metrics["objective/rlhf_reward"] == 1.5
    assert metrics["lr/policy"] == 0.1
    assert metrics["perf/train_tokens_per_second"] == 4.0
    assert metrics["coordinator/bytes_per_sample"] == 100.0
