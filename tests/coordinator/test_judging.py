from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.rewards import RewardSection
from rlhf_dist.contracts.experience import StopReason
from rlhf_dist.contracts.reward import RewardResult
from rlhf_dist.contracts.roles import ScoreInfo
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.coordinator.judging import faults_of, judge, raw_rewards
from rlhf_dist.coordinator.shards import Shard
from rlhf_dist.rewards.mixture import RewardMixer

SECTION = {"sources": [{"name": "a", "kind": "function", "path": "m:a"}, {"name": "b", "kind": "function", "path": "m:b", "weight": 0.5}]}


def judged_by(shard: Shard, ranks: int, **values: list[float | None]) -> Shard:
    """Every ranks-th row belongs to a rank, as `rows_of_rank` deals them; ranks answer out of order."""
    for rank in reversed(range(ranks)):
        rows = tuple(range(rank, shard.rows, ranks))
        results = tuple(RewardResult(name, tuple(column[row] for row in rows)) for name, column in values.items())
        tally = Tally()
        tally.add("rewards/b_truncated", 1, len(rows))
        shard.scores.append(ScoreInfo(rows, results, 0.0, tally))
    return shard


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_interleaved_rows_come_back_in_order(sampled_shard: Callable[..., Shard], ranks: int) -> None:
    values = [float(n) for n in range(5)]
    shard = judged_by(sampled_shard([1] * 5), ranks, a=values, b=[None, *values[1:]])
    assert raw_rewards(shard) == {"a": values, "b": [None, *values[1:]]}


def test_a_row_that_nobody_judged_is_an_error(sampled_shard: Callable[..., Shard]) -> None:
    shard = judged_by(sampled_shard([1] * 4), 2, a=[1.0] * 4)
    shard.scores.pop()
    with pytest.raises(ValueError, match="'a': 2 of 4 rows were judged by no rank"):
        raw_rewards(shard)


def test_scores_do_not_depend_on_ranks_and_shards(sampled_shard: Callable[..., Shard]) -> None:
    a, b = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [10.0, 20.0, None, 40.0, 50.0, 60.0]
    whole = judge(RewardMixer(RewardSection.model_validate(SECTION), 9), [judged_by(sampled_shard([3] * 6), 1, a=a, b=b)], 2, update=True)
    parts = [judged_by(sampled_shard([3] * 2), 2, a=a[:2], b=b[:2]), judged_by(sampled_shard([3] * 4), 3, a=a[2:], b=b[2:])]
    cut = judge(RewardMixer(RewardSection.model_validate(SECTION), 9), parts, 2, update=True)
    assert whole.scores == cut.scores == (5.0, 11.0, 2.0, 23.0, 29.0, 35.0)
    assert whole.raw == cut.raw == {"a": tuple(a), "b": tuple(b)}
    assert whole.keep == (True,) * 6
    assert cut.tally.means()["rewards/b_truncated"] == 5 / 6  # the ranks' own counts are merged: 5 answers over 6 rows
    second = cut.of(parts, 1)
    assert (second.scores, second.raw["b"]) == ((2.0, 23.0, 29.0, 35.0), (None, 40.0, 50.0, 60.0))


def test_a_group_with_an_unjudged_sample_is_dropped_whole_and_shown(sampled_shard: Callable[..., Shard]) -> None:
    shard = judged_by(sampled_shard([3] * 4), 2, a=[1.0, None, 2.0, 3.0], b=[None, None, 2.0, None])
    judged = judge(RewardMixer(RewardSection.model_validate(SECTION), 9), [shard], 2, update=True)
    assert judged.keep == (False, False, True, True)
    assert judged.tally.means()["rewards/dropped_samples"] == 2
    assert math.isnan(judged.scores[0])
    details = judged.of([shard], 0).details()
    assert details["score"] == [None, None, 3.0, 3.0]
    assert details["kept"] == [False, False, True, True]
    assert details["reward/a"] == [1.0, None, 2.0, 3.0]  # what was judged is logged, dropped or not


def test_length_control_sees_the_shards_lengths_and_stop_reasons(sampled_shard: Callable[..., Shard]) -> None:
    section = RewardSection.model_validate(
        SECTION | {"missing_stop": {"rule": "subtract", "value": 2.0}, "minimum_length": {"tokens": 3, "penalty": 4.0}}
    )
    shards = [
        judged_by(sampled_shard([9], [StopReason.LENGTH]), 1, a=[1.0], b=[0.0]),
        judged_by(sampled_shard([2, 5]), 1, a=[1.0, 1.0], b=[0.0, 0.0]),
    ]
    assert judge(RewardMixer(section, 9), shards, 1, update=True).scores == (-1.0, -3.0, 1.0)


def test_evaluation_learns_nothing(sampled_shard: Callable[..., Shard]) -> None:
    section: Any = {"sources": [SECTION["sources"][0] | {"normalise": "standardise"}]}
    mixer = RewardMixer(RewardSection.model_validate(section), 9)
    shards = [judged_by(sampled_shard([3] * 2), 1, a=[1.0, 3.0])]
    judge(mixer, shards, 1, update=False)
    assert mixer.state_dict()["a"]["count"] == 0
    judge(mixer, shards, 1, update=True)
    assert mixer.state_dict()["a"]["count"] == 2


def test_nothing_left_to_train_on_stops_the_run(sampled_shard: Callable[..., Shard]) -> None:
    shard = judged_by(sampled_shard([3] * 2), 1, a=[None, None], b=[None, None])
    with pytest.raises(UserError, match="all 2 samples were dropped"):
        judge(RewardMixer(RewardSection.model_validate(SECTION), 9), [shard], 1, update=True)


def test_failures_of_all_ranks_and_shards_meet_by_row(sampled_shard: Callable[..., Shard]) -> None:
    """Two shards of four rows on two ranks; b fails on rows 1 and 6 of all, a gets its default on row 4."""
    section = {
        "sources": [SECTION["sources"][0] | {"on_failure": "default", "default": 9.0}, SECTION["sources"][1] | {"on_failure": "drop_group"}]
    }
    shards = [sampled_shard([3] * 4), sampled_shard([3] * 4)]
    for number, shard in enumerate(shards):
        for rank in (1, 0):
            rows = (rank, rank + 2)
            failed = (0,) if (number, rank) == (0, 1) else (1,) if (number, rank) == (1, 0) else ()
            b = RewardResult("b", tuple(None if p in failed else 2.0 for p in (0, 1)), failed=failed, retried=1, timeouts=rank)
            defaulted = (0,) if (number, rank) == (1, 0) else ()
            a = RewardResult("a", tuple(9.0 if p in defaulted else 1.0 for p in (0, 1)), defaulted=defaulted)
            shard.scores.append(ScoreInfo(rows, (a, b), 0.0))
    faults = faults_of(shards)
    assert faults.failed == {"a": set(), "b": {1, 6}} and faults.defaulted == {"a": {4}, "b": set()}
    assert faults.retried["b"] == 4 and faults.timeouts["b"] == 2
    judged = judge(RewardMixer(RewardSection.model_validate(section), 9), shards, 2, update=True)
    assert judged.keep == (False, False, True, True, True, True, False, False) and judged.dropped_by_failure == 4
    assert judged.genuine["a"] == (1.0,) * 4 + (None,) + (1.0,) * 3 and judged.raw["a"][4] == 9.0
    second = judged.of(shards, 1).details()
    assert second["fate/a"] == ["defaulted", "judged", "judged", "judged"] and second["fate/b"] == ["judged", "judged", "failed", "judged"]
    assert second["reward/b"] == [2.0, 2.0, None, 2.0] and second["score"][2:] == [None, None]
    means = judged.tally.means()
    assert (means["rewards/b_failed"], means["rewards/a_defaulted"], means["rewards/b_timeouts"], means["rewards/dropped_failed"]) == (
        2,
        1,
        2,
        4,
    )


def test_rewards_that_stop_the_run_have_no_fate(sampled_shard: Callable[..., Shard]) -> None:
    judged = judge(
        RewardMixer(RewardSection.model_validate(SECTION), 9),
        [judged_by(sampled_shard([3]), 1, a=[1.0], b=[None])], 1, update=True,
    )  # fmt: skip
    assert judged.fates == {} and judged.genuine == judged.raw and not any(name.startswith("fate/") for name in judged.details())
