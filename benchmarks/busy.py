"""When workers were busy: a PPO program whose workers write down each call, and whose coordinator writes down each iteration.

An instant at which no worker of any role on any rank computes is the coordinator's own: its arithmetic and bookkeeping, the dispatch of
calls, and the way of messages and payloads between processes. So what is called the coordinator's share here is an upper bound of it.

Clocks are those of the machines: over several machines the figures are as exact as their clocks agree.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rlhf_dist.cli.programs import PROGRAMS, PPOProgram
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.engines.process import Rank
from rlhf_dist.runs.progress import Reporter
from rlhf_dist.runs.recorder import Recorder

Interval = tuple[float, float]
FILE = "busy.json"


class WatchedWorker:
    """A worker that remembers when it was busy; every method is that of the worker inside."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._intervals: list[Interval] = []

    def busy_intervals(self) -> list[Interval]:
        """Begin and end of every call so far, in seconds since the epoch."""
        return self._intervals

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._worker, name)
        return self._watched(found) if callable(found) else found

    def _watched(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.time()
            try:
                return method(*arguments, **options)
            finally:
                self._intervals.append((began, time.time()))

        return call


class IterationReporter:
    """Passes everything on, and remembers when each iteration began and ended.

    An iteration begins with its first phase and ends when the step is shown, its metrics written by then; where an evaluation follows,
    it ends before that.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.iterations: list[Interval] = []
        self._began: float | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reporter, name)

    def phase(self, step: int, name: str) -> None:
        """A phase begins."""
        if name == "evaluate":
            self._end()
        elif self._began is None:
            self._began = time.time()
        self._reporter.phase(step, name)

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """An iteration is over."""
        self._end()
        self._reporter.step(step, total, metrics)

    def _end(self) -> None:
        if self._began is not None:
            self.iterations.append((self._began, time.time()))
            self._began = None


class WatchedPPO(PPOProgram):
    """PPO, watched; leaves `busy.json` in the run folder."""

    def factory(self, role: str) -> Callable[[Rank], Any]:
        """The role's worker, watched."""
        return functools.partial(_build_watched, super().factory(role))

    def run(self, groups: Mapping[str, Any], recorder: Recorder, reporter: Reporter, *others: Any) -> dict[str, Any]:
        """The PPO loop; then the intervals of all workers are collected. others: of the program, passed on."""
        watched = IterationReporter(reporter)
        summary = super().run(groups, recorder, watched, *others)
        busy = {name: group.collect(group.submit(WatchedWorker.busy_intervals, [()] * group.world_size)) for name, group in groups.items()}
        if recorder.folder:
            (recorder.folder.root / FILE).write_text(json.dumps({"iterations": watched.iterations, "busy": busy}), encoding="utf-8")
        return summary


@contextmanager
def watching() -> Iterator[None]:
    """Within it this process launches PPO watched."""
    plain, PROGRAMS[PPOConfig] = PROGRAMS[PPOConfig], WatchedPPO
    try:
        yield
    finally:
        PROGRAMS[PPOConfig] = plain


def union_seconds(intervals: Iterable[Interval], window: Interval) -> float:
    """Seconds of a window in which at least one interval holds."""
    total, reached = 0.0, window[0]
    for began, ended in sorted((max(began, window[0]), min(ended, window[1])) for began, ended in intervals):
        total += max(ended - max(began, reached), 0.0)
        reached = max(reached, ended)
    return total


def idle_shares(iterations: Sequence[Interval], busy: Mapping[str, Sequence[Sequence[Interval]]]) -> list[float]:
    """Of each iteration the share in which no worker of any role was busy.

    Args:
        busy: by role, of each rank its intervals.
    """
    everyone = [interval for ranks in busy.values() for intervals in ranks for interval in intervals]
    return [1 - union_seconds(everyone, window) / (window[1] - window[0]) for window in iterations]


def _build_watched(factory: Callable[[Rank], Any], rank: Rank) -> WatchedWorker:
    return WatchedWorker(factory(rank))
