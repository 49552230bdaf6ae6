from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.group import Late, Lost, RankReport
from rlhf_dist.runs.supervision import Budget, missing_ranks, rebuild, stuck_report

DEATH = Lost("a worker process died", where="reward rank 1, judge", fix="look into the logs")
GATHERING = 'File "/lib/torch/distributed/distributed_c10d.py", line 3, in all_reduce'
LOOPING = 'File "/home/user/reward.py", line 9, in judge\n  while True: pass'


class Group:
    def __init__(self, name: str, reports: list[RankReport], log: list[str] | None = None, *, dies: bool = False) -> None:
        self.name, self.reports, self.log, self.dies = name, reports, [] if log is None else log, dies

    def census(self) -> list[RankReport]:
        return self.reports

    def begin_rebuild(self) -> None:
        self.log.append(f"{self.name} begins")

    def finish_start(self) -> None:
        if self.dies:
            raise DEATH
        self.log.append(f"{self.name} is there")


def rank(number: int, method: str = "", stack: str = "", *, answered: bool = True) -> RankReport:
    return RankReport(number, answered, f"node, pid {number}", method, 7, 61.0, stack)


# --- how often


def test_so_many_recoveries_in_a_row_and_no_more() -> None:
    budget = Budget(2)
    budget.charge(4, DEATH)
    budget.charge(4, DEATH)
    with pytest.raises(UserError, match="died; 2 recoveries did not get the run past step 4") as error:
        budget.charge(4, DEATH)
    assert error.value.where == DEATH.where and "look into the logs" in error.value.fix and "placement.restarts" in error.value.fix
    assert not isinstance(error.value, Lost), "nobody tries again after that"


def test_none_means_none() -> None:
    with pytest.raises(UserError, match="0 recoveries"):
        Budget(0).charge(9, DEATH)


@given(restarts=st.integers(1, 4), steps=st.lists(st.integers(0, 6), max_size=60))
def test_only_a_run_that_gets_further_than_ever_has_all_of_them_again(restarts: int, steps: list[int]) -> None:
    """Falling back to a checkpoint and dying at the same place again is no progress: it must end."""
    budget, furthest, left = Budget(restarts), 0, restarts
    for step in steps:
        if step > furthest:
            furthest, left = step, restarts
        if left == 0:
            with pytest.raises(UserError):
                budget.charge(step, DEATH)
            return
        budget.charge(step, DEATH)
        left -= 1
    assert (budget.furthest, budget.spent) == (furthest, restarts - left)


# --- anew


def test_groups_load_side_by_side() -> None:
    log: list[str] = []
    rebuild([Group("policy", [], log), Group("value", [], log)])  # type: ignore[list-item]
    assert log == ["policy begins", "value begins", "policy is there", "value is there"]


def test_a_rank_that_dies_while_it_loads_is_lost_again() -> None:
    with pytest.raises(Lost, match="died"):
        rebuild([Group("policy", [], dies=True)])  # type: ignore[list-item]


# --- stuck


def report(*groups: Group) -> tuple[str, list[str]]:
    lost = Late("no answer within 60 s", where="policy rank 0, update", fix="see the logs")
    text, blamed = stuck_report(lost, groups, "step 3, phase train")  # type: ignore[arg-type]
    return text, [group.name for group in blamed]


def test_the_report_names_role_rank_phase_step_and_the_missing_rank_with_all_stacks() -> None:
    policy = Group("policy", [rank(0, "update", GATHERING), rank(1, "update", LOOPING), rank(2, "update", GATHERING)])
    text, blamed = report(policy, Group("reward", [rank(0), rank(1)]))
    lines = text.splitlines()
    assert lines[:3] == ["no answer within 60 s", "asked: policy rank 0, update", "step 3, phase train"]
    assert "policy: waits in a collective for rank 1" in lines and "reward: idle" in lines
    assert "  rank 1 (node, pid 1), 7 calls begun: in update for 61 s" in lines and "      while True: pass" in lines
    assert text.count("all_reduce") == 2 and "  rank 0 (node, pid 0), 7 calls begun: between calls" in lines
    assert blamed == ["policy"]


def test_a_rank_without_a_sign_of_life_is_to_blame() -> None:
    text, blamed = report(Group("policy", [rank(0)]), Group("reward", [rank(0), rank(1, answered=False)]))
    assert "reward: no sign of life from rank 1" in text and "NO SIGN OF LIFE" in text and blamed == ["reward"]


def test_who_works_may_be_to_blame_and_who_is_between_calls_is_not() -> None:
    text, blamed = report(Group("policy", [rank(0)]), Group("reward", [rank(0, "judge", LOOPING)]))
    assert "reward: working" in text and blamed == ["reward"]
    assert report(Group("policy", [rank(0)])) == (report(Group("policy", [rank(0)]))[0], [])


@pytest.mark.parametrize(
    ("reports", "missing"),
    [
        ([rank(0, "update", GATHERING), rank(1, "update", GATHERING)], []),
        ([rank(0, "update", GATHERING), rank(1)], [1]),
        ([rank(0, "update", GATHERING), rank(1, "update", GATHERING, answered=False)], [1]),
        ([rank(0, "update", LOOPING), rank(1, "update", LOOPING)], []),
        ([rank(0, "", GATHERING), rank(1, "update", LOOPING)], []),  # a thread of the library waits there between calls
    ],
    ids=["all wait", "one is elsewhere", "one is silent", "none waits", "not in a call"],
)
def test_missing_is_who_is_not_in_the_collective_that_others_wait_in(reports: list[Any], missing: list[int]) -> None:
    assert missing_ranks(reports) == missing
