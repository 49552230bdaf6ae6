"""RayGroup with a small real worker: references, records, errors, deadlines, death."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import rlhf_dist
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.operation import PlacementSection
from rlhf_dist.contracts.group import Late, Lost, Stored, SupervisedGroup
from rlhf_dist.runs.supervision import stuck_report
from rlhf_dist.workers.placement import Demand
from rlhf_dist.workers.ray_group import RayGroup, get, release, wait_all

pytestmark = pytest.mark.distributed
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Worker:
    """Answers about itself."""

    def __init__(self, rank: Any) -> None:
        self.rank = rank

    def make(self, size: int) -> Stored[torch.Tensor, dict[str, int]]:
        return Stored(torch.full((size,), float(self.rank.rank)), {"rank": self.rank.rank, "size": size})

    def total(self, pieces: list[torch.Tensor], named: tuple[str, torch.Tensor]) -> float:
        return float(sum(piece.sum() for piece in pieces) + named[1].sum())

    def reduced(self) -> float:
        value = torch.tensor([float(self.rank.rank + 1)])
        torch.distributed.all_reduce(value)
        return float(value)

    def folder(self) -> tuple[str, str]:
        return os.getcwd(), os.environ["OMP_NUM_THREADS"]

    def environment(self) -> tuple[bool, str, str, str]:
        names = ("OTHER_INTERPRETER", "PYTHONPATH", "VLLM_LOGGING_LEVEL")
        return torch.distributed.is_initialized(), *(os.environ.get(name, "") for name in names)  # type: ignore[return-value]

    def fail(self, kind: str) -> None:
        if self.rank.rank == 1:
            raise UserError("broken", where="here", fix="mend it") if kind == "user" else ZeroDivisionError("inside")
        time.sleep(60)  # like a rank that waits in a collective for the one that failed

    def die(self) -> None:
        os._exit(1)

    def sleepy(self, rank: int) -> None:
        """A rank that never comes to the collective in which the others wait."""
        if self.rank.rank == rank:
            time.sleep(600)
        torch.distributed.all_reduce(torch.zeros(1))

    def rewarded(self) -> None:
        users_reward()


def users_reward() -> None:
    """Waits for an answer that does not come."""
    time.sleep(600)


@pytest.fixture(scope="module")
def group(ray_session: None) -> Iterator[RayGroup]:
    group = RayGroup(Demand("policy", 2, 0.5, 0.0, "PACK"), Worker, PlacementSection(threads_per_rank=3))
    group.begin_start()
    group.finish_start()
    yield group
    group.close()


def test_records_come_back_in_rank_order_and_payloads_stay_away(group: RayGroup) -> None:
    before = group.bytes_received
    handles = group.submit(Worker.make, [(1000,), (2000,)])
    assert group.collect(handles) == [{"rank": 0, "size": 1000}, {"rank": 1, "size": 2000}]
    assert group.bytes_received - before < 200, "only the records reach the caller"


def test_handles_stand_for_their_payloads_anywhere_in_the_arguments(group: RayGroup) -> None:
    first, second = group.submit(Worker.make, [(10,), (20,)])
    before = group.bytes_sent
    answers = group.collect(group.submit(Worker.total, [([first, second, second], ("x", second))] * 2))
    assert answers == [60.0, 60.0]
    assert group.bytes_sent - before < 500, "references travel, not tensors"


def test_ranks_share_a_process_group(group: RayGroup) -> None:
    assert group.collect(group.submit(Worker.reduced, [()] * 2)) == [3.0, 3.0]


def test_actors_stand_in_the_users_folder_with_the_threads_of_the_config(group: RayGroup) -> None:
    assert group.collect(group.submit(Worker.folder, [()] * 2)) == [(os.getcwd(), "3")] * 2


def test_a_rank_without_a_part_is_not_asked(group: RayGroup) -> None:
    """Its handle is not there: the others come in the order of the ranks."""
    only = group.submit(Worker.make, [None, (3,)])
    assert group.collect(only) == [{"rank": 1, "size": 3}] and group.submit(Worker.make, [None, None]) == []
    assert group.collect(group.submit(Worker.total, [([only[0]], ("x", only[0])), None])) == [6.0]


def test_a_late_answer_names_every_rank_that_is_waited_for(group: RayGroup) -> None:
    @ray.remote(num_cpus=0)
    def slow() -> None:
        time.sleep(30)

    waiting = {slow.remote(): f"policy rank {rank}, generate" for rank in range(2)}
    with pytest.raises(UserError, match="no answer") as caught:
        wait_all(waiting, 0.2)
    assert caught.value.where == "policy rank 0, generate; policy rank 1, generate"
    for reference in waiting:
        ray.cancel(reference, force=True)


def test_arguments_must_be_one_tuple_a_rank(group: RayGroup) -> None:
    with pytest.raises(AssertionError, match="2 ranks"):
        group.submit(Worker.reduced, [()])


def test_a_late_answer_is_an_error_that_says_who_was_asked(group: RayGroup) -> None:
    @ray.remote(num_cpus=0)
    def slow() -> None:
        time.sleep(30)

    reference = slow.remote()
    with pytest.raises(UserError, match=r"no answer within 0\.2 s") as caught:
        wait_all({reference: "policy rank 0, generate"}, 0.2)
    assert caught.value.where == "policy rank 0, generate"
    with pytest.raises(UserError, match="no answer"):
        get(reference, 0.2, "x")
    ray.cancel(reference, force=True)


@pytest.mark.parametrize(("kind", "expected"), [("user", UserError), ("other", ZeroDivisionError)])
def test_the_first_failure_is_raised_while_another_rank_still_waits(ray_session: None, kind: str, expected: type[Exception]) -> None:
    group = RayGroup(Demand("value", 2, 0.5, 0.0, "PACK"), Worker, PlacementSection())
    try:
        group.begin_start()
        group.finish_start()
        began = time.monotonic()
        with pytest.raises(expected) as caught:
            group.collect(group.submit(Worker.fail, [(kind,)] * 2))
        assert time.monotonic() - began < 30
        if kind == "user":
            assert (caught.value.what, caught.value.where, caught.value.fix) == ("broken", "here", "mend it")
            assert not isinstance(caught.value, Lost), "nobody died: starting the group anew would help nothing"
        else:
            with pytest.raises(UserError, match="died") as died:
                group.collect([*group.submit(Worker.fail, [(kind,), None]), *group.submit(Worker.die, [None, ()])])
            assert died.value.where == "value rank 1, die", "the one that died, not the one that waits"
    finally:
        group.close()
        group.close()
    assert ray.util.placement_group_table(group._bundles)["state"] != "CREATED"


def test_ranks_that_stand_alone_form_no_process_group_in_the_interpreter_they_ask_for(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter is this one, and leaves a mark by which it is told apart; vLLM's settings go with the process."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nOTHER_INTERPRETER=yes exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    group = RayGroup(Demand("rollout", 1, 0.5, 0.0, "PACK", alone=True, python=str(python)), Worker, PlacementSection())
    try:
        group.begin_start()
        group.finish_start()
        joined, mark, path, level = group.collect(group.submit(Worker.environment, [()]))[0]
        assert not joined and mark == "yes" and str(Path(rlhf_dist.__file__).parents[1]) in path and level == "ERROR"
    finally:
        group.close()


def test_a_factory_that_fails_is_reported_by_finish_start(ray_session: None) -> None:
    def broken(rank: Any) -> None:
        raise UserError("no model", where="folder", fix="name one")

    group = RayGroup(Demand("value", 1, 0.5, 0.0, "PACK"), broken, PlacementSection())
    try:
        group.begin_start()
        with pytest.raises(UserError, match="no model"):
            group.finish_start()
    finally:
        group.close()


def test_what_is_never_placed_is_an_error_within_the_deadline(ray_session: None) -> None:
    with pytest.raises(UserError, match="did not place the 1 ranks of reward within 1 s"):
        RayGroup(Demand("reward", 1, 1000.0, 0.0, "PACK"), Worker, PlacementSection(start_timeout_s=1))


@pytest.fixture
def two(ray_session: None) -> Iterator[Callable[..., RayGroup]]:
    """`two("policy", call_timeout_s=…)`: a group of two ranks that a test may kill."""
    made: list[RayGroup] = []

    def start(name: str = "policy", ranks: int = 2, **placement: Any) -> RayGroup:
        made.append(RayGroup(Demand(name, ranks, 0.5, 0.0, "PACK"), Worker, PlacementSection(**placement), "a run"))
        made[-1].begin_start()
        made[-1].finish_start()
        return made[-1]

    yield start
    for each in made:
        each.close()


def test_a_killed_rank_is_missed_and_its_group_is_rebuilt(two: Callable[..., RayGroup]) -> None:
    """The rank that waits for it in a collective may notice first, as an error of its own: it is a death all the same."""
    group = two()
    assert isinstance(group, SupervisedGroup)
    small, large = group.submit(Worker.make, [(10,), (50_000,)])  # the second is kept in the shared memory of the machine
    group.collect([small, large])
    before = group.processes()
    assert group.alive() and group.intact([small, large])
    waiting = group.submit(Worker.reduced, [(), None])
    assert group.intact(waiting), "on its way from a living process"
    os.kill(before[1], signal.SIGKILL)
    with pytest.raises(Lost) as caught:
        group.collect(waiting)
    assert not caught.value.late and "policy" in caught.value.where
    assert not group.alive() and not group.intact(waiting)
    assert [report.answered for report in group.census()] == [True, False]

    group.begin_rebuild()
    group.finish_start()
    assert group.alive() and not set(before) & set(group.processes())
    assert group.collect(group.submit(Worker.reduced, [()] * 2)) == [3.0, 3.0]


def test_a_stopped_rank_is_ended_by_the_heartbeat_and_named(two: Callable[..., RayGroup]) -> None:
    group = two("value", heartbeat_s=0.2, heartbeat_timeout_s=2.0)
    stopped = group.processes()[1]
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(Lost, match=r"^value rank 1 gave no sign of life for 2 s and was ended") as caught:
        group.collect(group.submit(Worker.reduced, [()] * 2))
    assert not caught.value.late and time.monotonic() - began < 30
    deadline = time.monotonic() + 15
    while _is_there(stopped) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _is_there(stopped), "a stopped process holds memory and devices"


def test_a_stuck_rank_is_reported_with_every_stack(two: Callable[..., RayGroup]) -> None:
    """A rank that sleeps, one that waits for it in a collective, and a reward that never answers."""
    policy, reward = two(call_timeout_s=2.0), two("reward", 1, call_timeout_s=2.0)
    policy.submit(Worker.reduced, [()] * 2)
    asked = [*policy.submit(Worker.sleepy, [(1,)] * 2), *reward.submit(Worker.rewarded, [()])]
    with pytest.raises(Late) as caught:
        policy.collect(asked)
    assert caught.value.late and "policy rank 1, sleepy" in caught.value.where and "reward rank 0, rewarded" in caught.value.where
    text, stuck = stuck_report(caught.value, [policy, reward], "step 3, phase train")
    assert stuck == [policy, reward]
    for part in (
        "step 3, phase train",
        "policy: waits in a collective for rank 1",
        "reward: working",
        ": in sleepy for ",
        ": in rewarded for ",
        "in all_reduce",  # rank 0's stack
        "time.sleep(600)",  # rank 1's stack
        "in users_reward",
    ):
        assert part in text, text
    assert text.count("rank 0 (") == 2 and text.count("rank 1 (") == 1
    assert "in pulse" not in text and policy.census()[0].calls == 3  # start, reduced, sleepy


def test_what_a_run_reserved_can_be_given_back_by_who_outlives_its_owner(two: Callable[..., RayGroup]) -> None:
    group = two("orphan", 1)
    assert ray.util.placement_group_table(group._bundles)["state"] == "CREATED"
    release("another run", [group._demand])
    assert ray.util.placement_group_table(group._bundles)["state"] == "CREATED"
    release("a run", [group._demand, Demand("never", 1, 0.5, 0.0, "PACK")])
    assert ray.util.placement_group_table(group._bundles)["state"] == "REMOVED"


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat", encoding="utf-8") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"
