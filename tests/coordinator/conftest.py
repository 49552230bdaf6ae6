"""Worker groups of any size inside one process, for workers that a test makes up."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.roles import RolloutInfo
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.coordinator.shards import Shard


@dataclass(frozen=True)
class LocalHandle:
    """An answer that is there already."""

    payload: Any
    record: Any

    def info(self) -> Any:
        return self.record


class LocalGroup:
    """contracts.group.WorkerGroup over plain objects, one a rank; `calls` keeps (method, rank, arguments) as they were submitted."""

    def __init__(self, name: str, workers: Sequence[Any], calls: list[Any] | None = None) -> None:
        self.name, self.world_size, self.workers = name, len(workers), workers
        self.calls: list[tuple[str, int, tuple[Any, ...]]] = [] if calls is None else calls

    def submit(self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...] | None]) -> list[LocalHandle]:
        assert len(arguments) == self.world_size
        handles = []
        for rank, (worker, given) in enumerate(zip(self.workers, arguments, strict=True)):
            if given is None:
                continue
            self.calls.append((f"{self.name}.{method.__name__}", rank, given))
            answer = getattr(worker, method.__name__)(*_delivered(given))
            handles.append(LocalHandle(answer.payload, answer.info) if isinstance(answer, Stored) else LocalHandle(None, answer))
        return handles

    def collect(self, handles: Sequence[LocalHandle]) -> list[Any]:
        return [handle.info() for handle in handles]

    def close(self) -> None:
        pass


def _delivered(value: Any) -> Any:
    if isinstance(value, LocalHandle):
        return value.payload
    return type(value)(_delivered(item) for item in value) if type(value) in (tuple, list) else value


@pytest.fixture(scope="session")
def local_group() -> type[LocalGroup]:
    return LocalGroup


@pytest.fixture(scope="session")
def sampled_shard() -> Callable[..., Shard]:
    """`sampled_shard(lengths, reasons)`: a shard whose rollouts were collected, with so many response tokens in each row."""

    def shard(lengths: Sequence[int], reasons: Sequence[int] | None = None, tally: Tally | None = None) -> Shard:
        rows = len(lengths)
        numbers = tuple(range(rows))
        info = RolloutInfo(
            numbers, (0,) * rows, (3,) * rows, tuple(lengths), tuple(reasons or (0,) * rows), (0,) * rows, 0.0, tally or Tally()
        )
        return Shard(LocalHandle("rollouts", info), info=info)

    return shard


@pytest.fixture(scope="session")
def fakes() -> SimpleNamespace:
    """All of `fake_groups`, `fake_workers` and `fake_runs` beside this file: made-up ranks on a virtual clock, and runs over them."""
    names: dict[str, Any] = {}
    for name in ("fake_groups", "fake_workers", "fake_runs"):
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
            assert spec is not None and spec.loader is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        names |= vars(sys.modules[name])
    return SimpleNamespace(**names)


@pytest.fixture(scope="module")
def schedules(
    fakes: SimpleNamespace, tiny_run: Callable[[Path], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Runs of the coordinator over fake groups (fake_runs.Schedules)."""
    from rlhf_dist.coordinator import ppo
    from rlhf_dist.runs import summary

    with pytest.MonkeyPatch.context() as patch:  # of no interest there, and half of the time of a run without models
        patch.setattr(summary, "_version", functools.cache(summary._version))
        patch.setattr(ppo, "dump_config", lambda config: "")
        yield fakes.Schedules(fakes, fakes.configs(tiny_run(tmp_path_factory.mktemp("runs"))))
