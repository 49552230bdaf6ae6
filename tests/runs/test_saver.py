from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.operation import CheckpointSection
from rlhf_dist.contracts.engine import SavedFile
from rlhf_dist.contracts.group import Lost
from rlhf_dist.runs.checkpoints import Checkpoint
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.runs.saver import Saver


class Log(Recorder):
    """Notes what it is told."""

    def __init__(self, log: list[str], folder: str = "partial") -> None:
        super().__init__(None)
        self.log, self._root = log, folder
        self.committed: list[tuple[int, dict[str, Any], list[str], int]] = []

    def begin_checkpoint(self, step: int) -> str:
        self.log.append(f"folder {step}")
        return f"{self._root}/{step}" if self._root else ""

    def commit_checkpoint(self, step: int, state: dict[str, Any], written: Iterable[SavedFile], keep: int) -> None:
        self.log.append(f"commit {step}")
        self.committed.append((step, state, [file.name for file in written], keep))

    def clear_partial(self) -> None:
        self.log.append("clear")


class Group:
    """Two ranks; `slow` looks at whether the files are there find nothing yet."""

    def __init__(self, name: str, log: list[str], slow: int = 0) -> None:
        self.name, self.world_size, self.log, self.slow = name, 2, log, slow
        self.fails: Exception | None = None

    def submit(self, method: Callable[..., Any], arguments: Sequence[Any]) -> list[Any]:
        assert len(arguments) == 2
        self.log.append(f"{self.name} {method.__name__} {arguments[0][0]}")
        return [(method.__name__, rank, arguments[rank][0]) for rank in range(2)]

    def collect(self, handles: Sequence[Any]) -> list[Any]:
        if self.fails:
            raise self.fails
        (method, _, given), *_ = handles
        if method != "saved":
            return [None, None]
        self.slow -= 1
        late = self.slow >= 0 and not given
        return [None if late and rank else (SavedFile(f"rank_{rank}", 1, "sha"),) for _, rank, _ in handles]


def saver(log: list[str], slow: int = 0, folder: str = "partial", **section: Any) -> tuple[Saver, Log, list[Group]]:
    recorder, groups = Log(log, folder), [Group("policy", log), Group("value", log, slow)]
    return Saver(CheckpointSection(**section), groups, recorder, lambda group: log.append(f"turn of {group.name}")), recorder, groups


def checkpoint(step: int) -> Checkpoint:

    return Checkpoint(Path(f"final/{step}"), step, 0.0, {}, {}, {})


def test_all_copy_first_and_training_goes_on_before_anything_is_committed() -> None:
    log: list[str] = []
    one, recorder, _ = saver(log)
    one.begin(3, {"step": 3})
    assert log == ["folder 3", "turn of policy", "policy begin_save partial/3/policy", "turn of value", "value begin_save partial/3/value"]
    assert recorder.committed == []
    one.poll()
    assert recorder.committed == [(3, {"step": 3}, ["policy/rank_0", "policy/rank_1", "value/rank_0", "value/rank_1"], 2)]


def test_where_training_waits_it_is_committed_at_once() -> None:
    one, recorder, _ = saver([], slow=9, asynchronous=False, keep=5)
    one.begin(3, {}, lambda folder: [SavedFile(f"{folder}/pending", 1, "sha")])
    ((_, _, files, keep),) = recorder.committed
    assert keep == 5 and files[-1] == "partial/3/pending"


def test_it_counts_only_once_every_rank_has_written() -> None:
    one, recorder, _ = saver([], slow=2)
    one.begin(3, {})
    one.poll()
    one.poll()
    assert recorder.committed == []
    one.poll()
    one.poll()
    assert [step for step, *_ in recorder.committed] == [3], "and once"


def test_one_is_on_its_way_at_a_time() -> None:
    """Memory holds one copy: the next waits for the last."""
    log: list[str] = []
    one, recorder, _ = saver(log, slow=9)
    one.begin(3, {})
    one.begin(4, {})
    assert log.index("commit 3") < log.index("folder 4") and [step for step, *_ in recorder.committed] == [3]
    one.finish()
    assert [step for step, *_ in recorder.committed] == [3, 4]


def test_the_same_step_is_not_saved_twice() -> None:
    log: list[str] = []
    one, recorder, _ = saver(log)
    one.begin(3, {})
    one.finish()
    one.begin(3, {})
    one.finish()
    assert [step for step, *_ in recorder.committed] == [3] and log.count("folder 3") == 1
    other, again, _ = saver([])
    other.load(checkpoint(3))
    other.begin(3, {})
    other.finish()
    assert again.committed == [], "it was taken from there"


def test_what_is_abandoned_is_never_committed_and_may_be_taken_again() -> None:
    log: list[str] = []
    one, recorder, _ = saver(log)
    one.begin(3, {})
    one.abandon()
    one.finish()
    assert recorder.committed == [] and log[-1] == "clear"
    one.begin(3, {"again": True})
    one.finish()
    assert [state for _, state, *_ in recorder.committed] == [{"again": True}]


def test_after_going_back_to_before_what_was_committed_that_is_saved_again() -> None:
    """It was refused as damaged, and the run goes back further."""
    one, recorder, _ = saver([])
    one.begin(3, {})
    one.finish()
    one.abandon()
    one.begin(3, {})
    one.finish()
    assert [step for step, *_ in recorder.committed] == [3, 3]


@pytest.mark.parametrize("error", [Lost("died"), UserError("disk full")])
def test_a_save_that_fails_is_no_checkpoint(error: UserError) -> None:
    one, recorder, groups = saver([])
    one.begin(3, {})
    groups[1].fails = error
    with pytest.raises(type(error), match=error.what):
        one.poll()
    with pytest.raises(type(error)):
        one.begin(4, {})
    assert recorder.committed == []


def test_what_else_belongs_to_it_must_be_written_before_it_is_on_its_way() -> None:
    one, recorder, _ = saver([])

    def lost(folder: str) -> list[SavedFile]:
        raise Lost("what is pending is gone")

    with pytest.raises(Lost):
        one.begin(3, {}, lost)
    one.finish()
    assert recorder.committed == []


def test_groups_load_side_by_side_from_their_own_folders() -> None:
    log: list[str] = []
    one, _, _ = saver(log)
    one.load(checkpoint(7))
    assert log == ["turn of policy", "policy load_state final/7/policy", "turn of value", "value load_state final/7/value"]


def test_of_a_run_that_keeps_nothing_nothing_is_saved() -> None:
    log: list[str] = []
    one, recorder, _ = saver(log, folder="")
    one.begin(3, {})
    one.finish()
    assert log == ["folder 3"] and recorder.committed == []


def test_the_stall_is_told_once_and_only_where_there_was_one() -> None:
    one, _, _ = saver([])
    assert one.metrics() == {}
    one.begin(3, {})
    (stall,) = one.metrics().values()
    assert 0 < stall < 1 and one.metrics() == {}
