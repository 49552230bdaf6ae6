from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rlhf_dist.config.rewards import RewardSection
from rlhf_dist.contracts.experience import StopReason
from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.reward import RewardResult
from rlhf_dist.contracts.roles import GenerateRequest, PieceInfo, RolloutInfo, ScoreInfo, WrittenInfo
from rlhf_dist.coordinator.held_out import HeldOutRecord, Yardstick, evaluate
from rlhf_dist.coordinator.shards import Batch, Groups, Shard
from rlhf_dist.evaluation.held_out import HeldOutSamples


class Policy:
    """Samples two completions a prompt; the shard is the list of its rows' scores."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.written: list[Any] = []

    def generate(self, request: GenerateRequest) -> Stored[list[int], RolloutInfo]:
        prompts = [prompt for prompt in range(request.start, request.start + request.count) for _ in range(request.samples_per_prompt)]
        ids, zeros = tuple(prompts), (0,) * len(prompts)
        lengths = tuple(prompt + 1 for prompt in prompts)
        return Stored(prompts, RolloutInfo(ids, zeros, zeros, lengths, (int(StopReason.LENGTH),) * len(prompts), zeros, 0.0))

    def score(self, shard: list[int]) -> Stored[str, PieceInfo]:
        return Stored("piece", PieceInfo((), 0.0))

    def write_rollouts(self, path: str, shards: Sequence[list[int]], pieces: Any, details: Sequence[dict[str, Any]]) -> WrittenInfo:
        self.written.append((path, shards, pieces, details))
        rows = [row for shard in shards for row in shard]
        return WrittenInfo(len(rows), tuple(float(row) for row in rows)) if self.rank == 0 else WrittenInfo()


class Reward:
    """Abstains on prompt 1."""

    def judge(self, shard: list[int], stream: str, step: int) -> ScoreInfo:
        return ScoreInfo(tuple(range(len(shard))), (RewardResult("r", tuple(None if row == 1 else 10.0 * row for row in shard)),), 0.0)


def evaluated(local_group: Any) -> tuple[HeldOutSamples, Any]:
    policy = local_group("policy", [Policy(0), Policy(1)])
    groups = Groups(policy, local_group("reward", [Reward()]))
    policy.workers[0].reference_score = policy.workers[1].reference_score = policy.workers[0].score
    return evaluate(groups, yardstick("none"), Batch("eval", 5, 0, 3, 2), 7, "file.parquet"), policy


def yardstick(normalise: str) -> Yardstick:
    sources = [{"name": "r", "kind": "function", "path": "m:r", "normalise": normalise}]
    return Yardstick(RewardSection.model_validate({"sources": sources}), 8)


def test_all_ranks_samples_in_order_with_the_dropped_ones_unscored(local_group: Any) -> None:
    samples, _ = evaluated(local_group)
    assert list(samples.prompt_ids) == [0, 0, 1, 1, 2, 2]
    assert list(samples.scores) == [0.0, 0.0, None, None, 20.0, 20.0]
    assert list(samples.rewards["r"]) == [0.0, 0.0, None, None, 20.0, 20.0]
    assert list(samples.lengths) == [1, 1, 2, 2, 3, 3]
    assert list(samples.kl or []) == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]


def test_every_sample_is_written_with_its_fate(local_group: Any) -> None:
    _, policy = evaluated(local_group)
    path, shards, _, details = policy.workers[0].written[0]
    assert (path, shards) == ("file.parquet", [[0, 0], [1, 1, 2, 2]])
    assert [row for part in details for row in part["kept"]] == [True, True, False, False, True, True]


def test_normalised_scores_compare_over_the_whole_run(sampled_shard: Callable[..., Shard]) -> None:
    """Moments that move on would give the second evaluation, twice as good, the scores of the first."""

    def shard(values: tuple[float, ...]) -> Shard:
        judged = sampled_shard([1] * len(values))
        judged.scores.append(ScoreInfo(tuple(range(len(values))), (RewardResult("r", values),), 0.0))
        return judged

    standard = yardstick("standardise")
    assert standard.judge([shard((1.0, 2.0, 3.0))], 1).scores == (-1.0, 0.0, 1.0)
    assert standard.judge([shard((2.0, 4.0, 6.0))], 1).scores == (0.0, 2.0, 4.0)
    scaled = yardstick("scale")
    assert scaled.judge([shard((1.0, 2.0, 3.0))], 1).scores == (1.0, 2.0, 3.0)
    assert scaled.judge([shard((10.0, 20.0, 30.0))], 1).scores == (10.0, 20.0, 30.0)


def samples(scores: list[float | None]) -> HeldOutSamples:
    return HeldOutSamples([1, 1, 2], scores, {"r": scores}, [3, 3, 3], [0, 0, 0], [0.0, 0.0, 1.0])


def test_the_record_compares_the_first_with_the_latest() -> None:
    record = HeldOutRecord()
    assert record.summary(None, None) is None
    assert record.add(samples([0.0, 1.0, 2.0])).score.mean == 1.25
    record.add(samples([9.0, 9.0, 9.0]))
    record.add(samples([1.0, None, 4.0]))
    summary = record.summary(9.0, 1)
    assert summary is not None and summary.difference is not None
    assert summary.before["score"]["mean"] == 1.25
    assert summary.after["score"]["mean"] == 2.5
    assert summary.difference["score"]["mean"] == pytest.approx(1.5)  # paired: (1 − 0) and (4 − 2); the unscored sample is in no pair
    assert summary.difference["kl"]["mean"] == 0.0
    assert (summary.best_score, summary.best_step) == (9.0, 1)


def test_an_abstention_takes_its_own_sample_away_and_no_other(local_group: Any) -> None:
    """Held-out samples of a prompt are not compared with each other: the rest of them still counts."""

    class Choosy:
        def judge(self, shard: list[int], stream: str, step: int) -> ScoreInfo:
            scores = tuple(None if row % 2 else 10.0 * prompt for row, prompt in enumerate(shard))
            return ScoreInfo(tuple(range(len(shard))), (RewardResult("r", scores),), 0.0)

    policy = local_group("policy", [Policy(0)])
    policy.workers[0].reference_score = policy.workers[0].score
    groups = Groups(policy, local_group("reward", [Choosy()]))
    samples = evaluate(groups, yardstick("none"), Batch("eval", 5, 0, 3, 2), 7, "file.parquet")
    assert list(samples.scores) == [0.0, None, 10.0, None, 20.0, None]
    assert policy.workers[0].written[0][3][0]["kept"] == [True, False] * 3
