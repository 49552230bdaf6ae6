"""A worker group inside the processes of a launcher, or in one plain process: no Ray anywhere.

Every rank runs the coordinator; `submit` runs this rank's part at once; records are gathered from all ranks, and a payload that
another rank made is fetched when a call needs it. All ranks make the same calls in the same order, so the collectives meet.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from rlhf_dist.engines.process import Rank
from rlhf_dist.workers.wire import split

T = TypeVar("T")


class SpmdHandle:
    """One rank's answer, as another rank (or its own) knows it.

    Args:
        owner: the rank that made it.
        here: this process.
    """

    def __init__(self, owner: int, here: Rank) -> None:
        self.owner, self._here = owner, here
        self._shared = here.world_size == 1
        self._payload: Any = None
        self._record: bytes | None = None

    def fill(self, payload: Any, record: bytes) -> None:
        """Keeps this rank's own answer."""
        self._payload, self._record = payload, record

    def payload(self) -> Any:
        """The payload, sent by its owner to all ranks the first time that a call needs it. Collective."""
        if not self._shared:
            box = [self._payload]
            dist.broadcast_object_list(box, src=self.owner)
            self._payload, self._shared = box[0], True
        return self._payload

    def record(self) -> bytes | None:
        """The record as bytes; None on a rank that was not told yet."""
        return self._record

    def tell(self, record: bytes) -> None:
        """Takes in what the owner sent."""
        self._record = record

    def info(self) -> Any:
        """The record."""
        assert self._record is not None, "collect the handle first: its record is on another rank"
        return pickle.loads(self._record)


class SpmdGroup:
    """All ranks of the process group in one role (contracts.group.WorkerGroup).

    Args:
        name: the role.
        worker: this rank's worker.
        rank: this process.
    """

    def __init__(self, name: str, worker: Any, rank: Rank) -> None:
        self.name, self.world_size = name, rank.world_size
        self.bytes_sent = self.bytes_received = 0
        self._worker, self._rank = worker, rank

    def submit(self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...] | None]) -> list[SpmdHandle]:
        """Runs this rank's part.

        A failure is raised here at once, on this rank alone: its process ends, and the launcher ends the others.
        Going on to the next collective would let the ranks' calls fall out of step.
        """
        assert len(arguments) == self.world_size, f"{self.name} has {self.world_size} ranks, got arguments for {len(arguments)}"
        given = [deliver(each) for each in arguments][self._rank.rank]
        handles = {owner: SpmdHandle(owner, self._rank) for owner, each in enumerate(arguments) if each is not None}
        if given is not None:
            handles[self._rank.rank].fill(*split(getattr(self._worker, method.__name__)(*given)))
        return list(handles.values())

    def collect(self, handles: Sequence[SpmdHandle]) -> list[Any]:
        """The records of all ranks, the same everywhere."""
        if self.world_size > 1:
            everyone: list[Any] = [None] * self.world_size
            dist.all_gather_object(everyone, [handle.record() for handle in handles])
            for number, handle in enumerate(handles):
                handle.tell(everyone[handle.owner][number])
        self.bytes_received += sum(len(handle.record() or b"") for handle in handles)
        return [handle.info() for handle in handles]

    def close(self) -> None:
        """Lets the worker go. The process group is the launcher's to end."""
        self._worker = None


def deliver(value: Any) -> Any:
    """Replaces handles by payloads, inside tuples and lists too. Every rank delivers all ranks' arguments: fetching is collective."""
    if isinstance(value, SpmdHandle):
        return value.payload()
    if isinstance(value, tuple | list):
        return type(value)(deliver(item) for item in value)
    return value


def any_rank(here: Rank, mine: bool) -> bool:
    """Whether it is so on any rank; the same answer on all. Collective."""
    if here.world_size == 1:
        return mine
    box: list[Any] = [None] * here.world_size
    dist.all_gather_object(box, mine)
    return any(box)


def agree(here: Rank, compute: Callable[[], T]) -> T:
    """Computes on rank 0 and sends the answer to all ranks. Collective.

    Raises:
        whatever rank 0 raised, there; the others end quietly with the same status, so that the user reads it once.
    """
    if here.world_size == 1:
        return compute()
    box: list[Any] = [None, False]
    failure: Exception | None = None
    if here.rank == 0:
        try:
            box[0] = compute()
        except Exception as error:
            failure, box[1] = error, True
    dist.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if box[1]:
        raise SystemExit(2)
    return box[0]  # type: ignore[no-any-return]
