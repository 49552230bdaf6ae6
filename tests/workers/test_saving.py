"""A trained worker gives its engine's state away and takes it up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_dist.contracts.engine import SavedFile
from rlhf_dist.workers.policy import PolicyWorker
from rlhf_dist.workers.saving import SavedWorker
from rlhf_dist.workers.supervised import SupervisedWorker
from rlhf_dist.workers.value import ValueWorker


class Engine:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def begin_save(self, folder: Path) -> None:
        self.calls.append(("begin_save", folder))

    def saved(self, wait: bool) -> tuple[SavedFile, ...] | None:
        return (SavedFile("a", 1, "x"),) if wait else None

    def load(self, folder: Path) -> None:
        self.calls.append(("load", folder))


def test_the_engine_is_asked(tmp_path: Path) -> None:
    worker, engine = SavedWorker(), Engine()
    worker._engine = engine  # type: ignore[assignment]
    worker.begin_save(str(tmp_path))
    assert worker.saved(False) is None and worker.saved(True) == (SavedFile("a", 1, "x"),)
    worker.load_state(str(tmp_path))
    assert engine.calls == [("begin_save", tmp_path), ("load", tmp_path)]


def test_all_that_learn_can_be_saved() -> None:
    assert all(issubclass(kind, SavedWorker) for kind in (PolicyWorker, ValueWorker, SupervisedWorker))
