"""SpmdGroup in one process, and over two ranks through a real process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.contracts.group import Stored
from rlhf_dist.engines.process import Rank
from rlhf_dist.workers.spmd_group import SpmdGroup, agree, any_rank, deliver

ALONE = Rank(0, 1, 0, "cpu")
PROGRAMS = Path(__file__).parents[1] / "distributed" / "programs"


class Worker:
    def make(self, value: int) -> Stored[list[int], int]:
        return Stored([value], value)

    def add(self, parts: list[list[int]]) -> int:
        return sum(x for part in parts for x in part)

    def fail(self) -> None:
        raise ValueError("inside")


def test_in_one_process_handles_stand_for_their_payloads() -> None:
    group = SpmdGroup("policy", Worker(), ALONE)
    first, second = group.submit(Worker.make, [(1,)])[0], group.submit(Worker.make, [(2,)])[0]
    assert group.collect([first, second]) == [1, 2]
    assert group.collect(group.submit(Worker.add, [([first, second],)])) == [3]
    assert deliver({"not": "opened"}) == {"not": "opened"} and deliver((first, [second])) == ([1], [[2]])


def test_a_rank_without_a_part_runs_nothing_and_knows_the_others_handles() -> None:
    group = SpmdGroup("policy", Worker(), ALONE)
    assert group.submit(Worker.fail, [None]) == []
    second = SpmdGroup("policy", Worker(), Rank(1, 3, 1, "cpu"))
    handles = second.submit(Worker.make, [(1,), None, (3,)])
    assert [handle.owner for handle in handles] == [0, 2] and all(handle.record() is None for handle in handles)


def test_a_failure_is_raised_at_once() -> None:
    with pytest.raises(ValueError, match="inside"):
        SpmdGroup("policy", Worker(), ALONE).submit(Worker.fail, [()])


def test_a_record_of_another_rank_must_be_collected_first() -> None:
    group = SpmdGroup("policy", Worker(), Rank(0, 2, 0, "cpu"))
    handles = group.submit(Worker.make, [(1,), (2,)])
    with pytest.raises(AssertionError, match="collect"):
        handles[1].info()


def test_agree_computes_on_the_first_rank() -> None:
    assert agree(ALONE, lambda: 5) == 5


def test_alone_any_rank_is_this_one() -> None:
    assert any_rank(ALONE, True) and not any_rank(ALONE, False)


@pytest.mark.distributed
def test_over_two_ranks_records_and_payloads_cross(run_ranks: Any) -> None:
    answers = run_ranks(PROGRAMS / "spmd_exchange.py", 2)
    assert [answer["records"] for answer in answers] == [[10, 11]] * 2
    assert [answer["sum"] for answer in answers] == [[21 + 0, 21 + 1]] * 2
    assert [answer["agreed"] for answer in answers] == ["from rank 0"] * 2
    assert [answer["disagreed"] for answer in answers] == ["ValueError", "SystemExit"], "the user reads a failure once"
    assert [answer["stopping"] for answer in answers] == [[True, False]] * 2, "asked on one rank, all stop at the same step"
