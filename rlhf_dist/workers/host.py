"""The actor: one rank's process, with one worker in it, which also answers while it is at work."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import ray

from rlhf_dist.contracts.group import RankReport
from rlhf_dist.workers.wire import split, unpack

Factory = Callable[[Any], Any]
"""Makes a worker from its `engines.process.Rank`."""

LEEWAY = 1.5
"""A collective outlasts the deadline of whoever waits for it: a rank that is missing is named by the supervisor."""
CONTROL = "control"
"""Calls that are answered at any time, by a thread of their own."""


@ray.remote(concurrency_groups={CONTROL: 2})  # type: ignore[call-overload]
class Host:
    """Calls of the worker run one after the other, in one thread; those of the control group beside them."""

    def __init__(self, folder: str) -> None:
        if os.path.isdir(folder):
            os.chdir(folder)  # relative paths mean what they meant to the user
        self._worker: Any = None
        self._method, self._calls, self._since = "", 0, time.monotonic()

    def address(self) -> tuple[str, int]:
        """Where the group's ranks can meet, seen from rank 0."""
        from rlhf_dist.engines.process import free_port

        return str(ray.util.get_node_ip_address()), free_port()

    def start(self, place: tuple[int, int, str, int], factory: Factory, alone: bool, timeout_s: float) -> None:
        """Joins the process group, unless its ranks stand alone, and loads the worker. place: rank, world size, address, port."""
        from rlhf_dist.engines.process import rank_alone, start_process_group

        self._enter("start")
        rank, world_size, address, port = place
        joined = rank_alone(rank, world_size) if alone else start_process_group(rank, world_size, 0, address, port, LEEWAY * timeout_s)
        self._worker = factory(joined)
        self._method = ""

    @ray.method(num_returns=2)
    def invoke(self, method: str, arguments: bytes, *payloads: Any) -> tuple[Any, bytes]:
        """Calls the worker."""
        self._enter(method)
        try:
            return split(getattr(self._worker, method)(*unpack(arguments, payloads)))
        finally:
            self._method = ""

    @ray.method(concurrency_group=CONTROL)
    def pulse(self) -> int:
        """A sign of life: the process's number."""
        return os.getpid()

    @ray.method(concurrency_group=CONTROL)
    def report(self, rank: int) -> RankReport:
        """What this rank is at."""
        where = f"{ray.util.get_node_ip_address()}, process {os.getpid()}"
        seconds = time.monotonic() - self._since if self._method else 0.0
        return RankReport(rank, True, where, self._method, self._calls, seconds, _stacks())

    def _enter(self, method: str) -> None:
        self._method, self._since = method, time.monotonic()
        self._calls += 1


def _stacks() -> str:
    """Of every Python thread but this one, and those that only wait to be asked."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            parts.append(f"thread {names.get(ident, ident)}\n" + "".join(traceback.format_stack(frame)))
    return "\n".join(parts)
