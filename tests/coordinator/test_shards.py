from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.reward import RewardResult
from rlhf_dist.contracts.roles import GenerateRequest, PieceInfo, RolloutInfo, ScoreInfo
from rlhf_dist.coordinator.shards import (
    Batch,
    Groups,
    Shard,
    collect_rollouts,
    collect_scores,
    cut_prompts,
    generate,
    sampling_seconds,
    score,
    score_frozen,
    score_trained,
)


class Worker:
    """Answers every question with its name, rank and what it was given."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def generate(self, request: GenerateRequest) -> Stored[Any, RolloutInfo]:
        ids = tuple(range(request.start, request.start + request.count))
        return Stored(ids, RolloutInfo(ids, (0,) * len(ids), (1,) * len(ids), (2,) * len(ids), (0,) * len(ids), (0,) * len(ids), 0.0))

    def score(self, shard: Any) -> Stored[Any, PieceInfo]:
        return Stored(("piece", self.rank, shard), PieceInfo((), 0.0))

    def reference_score(self, shard: Any) -> Stored[Any, PieceInfo]:
        return Stored(("reference", self.rank, shard), PieceInfo((), 0.0))

    def judge(self, shard: Any, stream: str, step: int) -> ScoreInfo:
        return ScoreInfo((self.rank,), (RewardResult("r", (float(self.rank),)),), 0.0)


def groups_of(local_group: Any, *, reference: bool = True, value: bool = True, ranks: int = 2) -> tuple[Groups, list[Any]]:
    calls: list[Any] = []

    def group(name: str) -> Any:
        return local_group(name, [Worker(rank) for rank in range(ranks)], calls)

    groups = Groups(group("policy"), group("reward"), group("reference") if reference else None, group("value") if value else None)
    return groups, calls


@given(start=st.integers(0, 10**6), count=st.integers(0, 300), parts=st.integers(1, 40))
def test_cuts_are_contiguous_and_even(start: int, count: int, parts: int) -> None:
    cuts = cut_prompts(start, count, parts)
    assert len(cuts) == parts
    assert [n for low, size in cuts for n in range(low, low + size)] == list(range(start, start + count))
    assert max(size for _, size in cuts) - min(size for _, size in cuts) <= 1


def test_every_rank_has_its_contiguous_shards_in_order(local_group: Any) -> None:
    groups, calls = groups_of(local_group)
    shards = generate(groups.policy, Batch("train", 7, 100, 12, 3, max_new_tokens=5), version=4, shards_per_rank=3)
    assert [shard.rollouts.payload for shard in shards] == [tuple(range(100 + 2 * n, 102 + 2 * n)) for n in range(6)]
    by_rank = {rank: [given[0] for _, r, given in calls if r == rank] for rank in (0, 1)}
    assert [request.start for request in by_rank[0]] == [100, 102, 104]
    assert [request.start for request in by_rank[1]] == [106, 108, 110]
    assert by_rank[1][2] == GenerateRequest("train", 7, 100, 110, 2, 3, 4, 5)


def test_more_shards_than_prompts_leaves_empty_ones(local_group: Any) -> None:
    groups, _ = groups_of(local_group, ranks=3)
    shards = generate(groups.policy, Batch("eval", 0, 0, 2, 1), version=0, shards_per_rank=1)
    assert sorted(len(shard.rollouts.payload) for shard in shards) == [0, 1, 1]


def test_all_engines_score_and_the_policy_comes_last(local_group: Any) -> None:
    groups, calls = groups_of(local_group)
    shards = generate(groups.policy, Batch("train", 0, 0, 4, 1), 0, 1)
    del calls[:]
    score(groups, shards, with_value=True)
    order = ["reference.score", "reward.judge", "value.score", "policy.score"]
    assert [name for name, rank, _ in calls if rank == 0] == [name for name in order for _ in shards]
    for shard in shards:
        given = [given for _, _, given in calls]  # 4 engines × 2 ranks, each with the handle, no tensor
        assert given.count((shard.rollouts,)) == 6 and given.count((shard.rollouts, "train", 0)) == 2
        assert [piece.payload[1] for piece in shard.pieces] == [0, 1] * 3
        assert len(shard.judged) == 2


@pytest.mark.parametrize(
    ("present", "expected"), [("value", {"value", "reward", "policy"}), ("reference", {"reference", "reward", "policy"})]
)
def test_engines_that_are_absent_are_not_asked(local_group: Any, present: str, expected: set[str]) -> None:
    groups, calls = groups_of(local_group, reference=present == "reference", value=present == "value")
    shards = generate(groups.policy, Batch("train", 0, 0, 2, 1), 0, 1)
    del calls[:]
    score(groups, shards, with_value=True)
    assert {name.split(".")[0] for name, _, _ in calls} == expected
    assert ("policy.reference_score" in {name for name, _, _ in calls}) == (present == "value")


def test_nobody_is_asked_twice_unless_the_answer_was_lost(local_group: Any) -> None:
    groups, calls = groups_of(local_group)
    shards = generate(groups.policy, Batch("train", 0, 0, 2, 1), 0, 1)
    score(groups, shards, with_value=True)
    del calls[:]
    score(groups, shards, with_value=True)
    assert calls == []
    del shards[0].asked["reference"]
    score(groups, shards, with_value=True)
    assert [name for name, _, _ in calls] == ["reference.score"] * 2


@pytest.mark.parametrize("reference", [True, False])
def test_what_learns_is_asked_apart_from_what_stays(local_group: Any, reference: bool) -> None:
    """A policy with an adapter is its own reference: asked for that too early, it would wait for samples instead of training."""
    groups, calls = groups_of(local_group, reference=reference)
    shards = generate(groups.policy, Batch("train", 0, 0, 2, 1), 0, 1)
    del calls[:]
    score_frozen(groups, shards)
    assert {name for name, _, _ in calls} == ({"reference.score", "reward.judge"} if reference else {"reward.judge"})
    del calls[:]
    score_trained(groups, shards)
    assert {name for name, _, _ in calls} == {"value.score", "policy.score"} | (set() if reference else {"policy.reference_score"})
    del calls[:]
    score_trained(groups, shards, with_policy=False)
    assert "policy.score" not in {name for name, _, _ in calls}


def test_sampling_took_as_long_as_the_slowest_rank(sampled_shard: Any) -> None:
    shards = [sampled_shard([1]) for _ in range(6)]
    for shard, seconds in zip(shards, (1.0, 2.0, 3.0, 0.5, 4.0, 5.0), strict=True):
        shard.info = dataclasses.replace(shard.info, seconds=seconds)
    assert sampling_seconds(shards, 2) == 9.5 and sampling_seconds(shards, 6) == 5.0


def test_an_evaluation_needs_no_values(local_group: Any) -> None:
    groups, calls = groups_of(local_group)
    score(groups, generate(groups.policy, Batch("eval", 0, 0, 2, 1), 0, 1), with_value=False)
    assert not any(name.startswith("value") for name, _, _ in calls)


def test_collecting_fills_the_shards(local_group: Any) -> None:
    groups, _ = groups_of(local_group)
    shards = generate(groups.policy, Batch("train", 0, 0, 5, 1), 0, 1)
    score(groups, shards, with_value=True)
    assert collect_rollouts(groups.policy, shards) == 10  # two response tokens a row
    assert [shard.rows for shard in shards] == [2, 3]
    collect_scores(groups, shards)
    assert [[info.rows for info in shard.scores] for shard in shards] == [[(0,), (1,)]] * 2


def test_rows_are_known_once_collected() -> None:
    with pytest.raises(AssertionError):
        _ = Shard(rollouts=None).rows  # type: ignore[arg-type]


def test_groups_name_those_that_exist(local_group: Any) -> None:
    full, _ = groups_of(local_group)
    assert [group.name for group in full.all()] == ["policy", "reward", "reference", "value"]
    assert [group.name for group in full.trained()] == ["policy", "value"]
    bare, _ = groups_of(local_group, reference=False, value=False)
    assert [group.name for group in bare.all()] == ["policy", "reward"]
    assert [group.name for group in bare.trained()] == ["policy"]


def test_bytes_are_those_of_all_groups_that_count_them(local_group: Any) -> None:
    groups, _ = groups_of(local_group)
    assert groups.bytes_moved() == 0
    groups.policy.bytes_sent, groups.value.bytes_received = 5, 7  # type: ignore[union-attr, attr-defined]
    assert groups.bytes_moved() == 12
