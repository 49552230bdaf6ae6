"""Worker groups of made-up ranks on a virtual clock: they are slow, late, stuck and dead when a schedule says so.

What they do is in `fake_workers`; here is when they do it, and who waits for whom.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.group import Late, Lost, RankReport, Stored

TIMEOUT = 100.0
LOADING = 4.0
SECONDS = {
    "generate": 4.0, "score": 1.0, "judge": 1.5, "estimate": 0.5, "load_experience": 0.5, "update": 1.5, "write_rollouts": 1.0,
    "sync_weights": 1.0, "send_weights": 2.0, "next_weights": 1.0, "take_weights": 1.5, "hold_weights": 0.5,
    "begin_save": 0.5, "save": 6.0, "save_rollouts": 1.0, "load_rollouts": 0.5, "load_state": 2.0, "export": 4.0,
}  # fmt: skip
QUICK = 0.05
PURE = {"generate", "score", "judge", "estimate", "ratio_check", "describe", "costs", "place"}
COLLECTIVE = {"score", "judge", "update", "ratio_check", "load_state", "export", "sync_weights", "next_weights"}
ACROSS = {"send_weights", "receive_weights"}
MOST_EVENTS = 40_000


class CoordinatorDied(BaseException):
    """Its process is gone: nothing of it may catch this."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong at a time.

    kind: kill, hang (never answers), slow (answers `seconds` later), coordinator (its process dies), stop (the run is asked to end).
    node: the machine is gone with the process, and with it what the process had computed.
    """

    at: float
    kind: str
    group: str = ""
    rank: int = 0
    node: bool = False
    seconds: float = 0.0


class World:
    """The clock, what will happen, and the disk.

    Args:
        seed: of every duration.
        disk: where ranks write.
        faults: what goes wrong.
        bad_starts: by group, how many of its next starts end with a dead rank.
        repeated: how likely a pure call is delivered twice.
    """

    def __init__(
        self,
        seed: int,
        disk: Any,
        faults: Iterable[Fault] = (),
        bad_starts: dict[str, int] | None = None,
        repeated: float = 0.0,
    ) -> None:
        self.rng, self.now, self.repeated = random.Random(seed), 0.0, repeated
        self.bad_starts = dict(bad_starts or {})
        self.groups: dict[str, FakeGroup] = {}
        self.disk = disk
        self.stopping = False
        self.max_staleness = self.held_out = 0
        self.counts: Counter[str] = Counter()
        self.numbers = itertools.count(1)
        self.meetings: dict[Any, Meeting] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        for fault in faults:
            self.at(fault.at, lambda fault=fault: self._strike(fault))

    def at(self, delay: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._number), what))

    def duration(self, name: str) -> float:
        return SECONDS.get(name, QUICK) * self.rng.uniform(0.4, 1.6)

    def tick(self) -> None:
        """The coordinator did something: time passes for everyone."""
        self.run_until(lambda: False, self.now + self.rng.uniform(0.0, 0.1))

    def run_until(self, over: Callable[[], bool], deadline: float) -> bool:
        """Lets things happen until something is over; False where the deadline came first."""
        while not over():
            self.counts["events"] += 1
            assert self.counts["events"] < MOST_EVENTS, "the run does not end"
            if not self._events or self._events[0][0] > deadline:
                self.now = deadline
                return False
            self.now, _, what = heapq.heappop(self._events)
            what()
        return True

    def _strike(self, fault: Fault) -> None:
        if fault.kind == "coordinator":
            self.counts["coordinator"] += 1
            raise CoordinatorDied
        if fault.kind == "stop":
            self.counts["stop"] += 1
            self.stopping = True
            return
        group = self.groups.get(fault.group)
        if group is None or fault.rank >= len(group.ranks) or group.ranks[fault.rank].dead:
            return
        self.counts[fault.kind] += 1
        rank = group.ranks[fault.rank]
        if fault.kind == "kill":
            rank.die(fault.node)
        elif fault.kind == "hang":
            rank.hung = True
        else:
            rank.late_until = self.now + fault.seconds


class FakeHandle:
    """An answer on its way (contracts.group.Handle)."""

    def __init__(self, rank: FakeRank, asked: str) -> None:
        self.rank, self.asked = rank, asked
        self.state, self.kept = "pending", True
        self.payload: Any = None
        self.record: Any = None
        self.error: Exception | None = None
        self.waiting: list[Callable[[], None]] = []

    def info(self) -> Any:
        return self.rank.group.collect([self])[0]

    def done(self, answer: Any) -> None:
        self.state = "done"
        self.payload, self.record = (answer.payload, answer.info) if isinstance(answer, Stored) else (None, answer)
        self._tell()

    def fail(self, error: Exception) -> None:
        if self.state == "pending":
            self.state, self.error = "failed", error
            self._tell()

    def _tell(self) -> None:
        waiting, self.waiting = self.waiting, []
        for each in waiting:
            each()


@dataclass
class Call:
    handle: FakeHandle
    method: str
    given: tuple[Any, ...]
    key: Any = None
    began: float = 0.0


@dataclass
class Meeting:
    """A collective call: it takes place when all ranks have come to it."""

    ranks: list[FakeRank]
    calls: list[Call] = field(default_factory=list)


class FakeRank:
    """A process: one call after the other, each once what it was given is there."""

    def __init__(self, group: FakeGroup, number: int, worker: Any) -> None:
        self.group, self.world, self.number, self.worker = group, group.world, number, worker
        self.queue: deque[Call] = deque()
        self.current: Call | None = None
        self.dead = self.hung = False
        self.late_until = 0.0
        self.calls = 0
        self.met: Counter[Any] = Counter()
        self.made: list[FakeHandle] = []

    def take(self, method: str, given: tuple[Any, ...]) -> FakeHandle:
        handle = FakeHandle(self, f"{self.group.name} rank {self.number}, {method}")
        if self.dead:
            handle.fail(self.death())
        else:
            self.queue.append(Call(handle, method, given))
            self.go_on()
        return handle

    def go_on(self) -> None:
        if self.dead or self.current or not self.queue:
            return
        call = self.queue[0]
        needed = list(_handles(call.given))
        for handle in needed:
            if handle.state == "pending":
                handle.waiting.append(self.go_on)
                return
        self.queue.popleft()
        self.current, call.began, self.calls = call, self.world.now, self.calls + 1
        lost = next((handle for handle in needed if handle.state == "failed" or not handle.kept), None)
        if lost is not None:
            self.current = None
            call.handle.fail(Lost(f"what came from {lost.asked} is gone", where=call.handle.asked, fix="look"))
            self.go_on()
        elif self.hung:
            pass  # begun, and never at an end
        elif call.method in COLLECTIVE or call.method in ACROSS:
            self._meet(call)
        else:
            self.world.at(self.world.duration(call.method) + getattr(self.worker, "still", lambda *_: 0.0)(call.method, call.given),
                          lambda: self._end([call]))  # fmt: skip

    def _meet(self, call: Call) -> None:
        across = call.method in ACROSS
        place = call.given[-1].port if across else (self.group.name, self.group.generation)
        self.met[place] += 1
        call.key = (place, self.met[place])
        together = [self.world.groups[name] for name in ("policy", "rollout")] if across else [self.group]
        ranks = [rank for group in together for rank in group.ranks]
        meeting = self.world.meetings.setdefault(call.key, Meeting(ranks))
        meeting.calls.append(call)
        if any(rank.dead for rank in meeting.ranks):
            self.world.at(0.0, lambda: _break(self.world, meeting))
        elif len(meeting.calls) == len(meeting.ranks):
            assert across or len({each.method for each in meeting.calls}) == 1, "ranks of a group met in different calls"
            self.world.at(self.world.duration(call.method), lambda: self._end(meeting.calls))

    def _end(self, calls: Sequence[Call]) -> None:
        ranks = [call.handle.rank for call in calls]
        late = max(rank.late_until for rank in ranks)
        if late > self.world.now:
            self.world.at(late - self.world.now, lambda: self._end(calls))
            return
        if any(rank.dead or rank.hung or rank.current is not call for rank, call in zip(ranks, calls, strict=True)):
            return  # whoever is left stands there until it is ended
        everyone = [(rank.worker, _delivered(call.given)) for rank, call in zip(ranks, calls, strict=True)]
        self.world.meetings.pop(calls[0].key, None)
        for rank in ranks:
            rank.current = None
        for rank, call, (worker, given) in zip(ranks, calls, everyone, strict=True):
            worker.everyone = everyone
            rank._answer(call, given)
        for rank in ranks:
            rank.go_on()

    def _answer(self, call: Call, given: tuple[Any, ...]) -> None:
        method = getattr(self.worker, call.method)
        try:
            answer = method(*given)
            if call.method in PURE and self.world.rng.random() < self.world.repeated:
                self.world.counts["repeated"] += 1
                again = method(*given)
                assert again == answer, f"{call.method} delivered twice answered otherwise"
        except UserError as error:
            call.handle.fail(error)
            return
        if isinstance(answer, Stored):
            self.made.append(call.handle)
        call.handle.done(answer)

    def die(self, node: bool) -> None:
        self.dead = True
        if node:
            for handle in self.made:
                handle.kept = False
        ended, self.current = [self.current, *self.queue], None
        self.queue.clear()
        for call in ended:
            if call is not None:
                call.handle.fail(self.death())
        for meeting in list(self.world.meetings.values()):
            if self in meeting.ranks:
                _break(self.world, meeting)

    def death(self) -> Lost:
        return Lost(f"{self.group.name} rank {self.number} died", where=self.group.name, fix="look for the cause")


def _break(world: World, meeting: Meeting) -> None:
    """Whoever has come to a collective with a dead rank stands there until it is ended, or hears of it."""
    for call in meeting.calls:
        rank = call.handle.rank
        if rank.current is call and world.rng.random() < 0.5:
            rank.current = None
            call.handle.fail(RuntimeError("connection closed by peer"))
            world.at(0.0, rank.go_on)


class FakeGroup:
    """contracts.group.SupervisedGroup on the virtual clock."""

    def __init__(self, world: World, name: str, size: int, build: Callable[[FakeGroup, int], Any]) -> None:
        self.world, self.name, self.world_size, self._build = world, name, size, build
        self.bytes_sent = self.bytes_received = 0
        self.generation = 0
        self.ranks: list[FakeRank] = []
        self._loaded = 0.0
        world.groups[name] = self
        self._start()

    def submit(self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...] | None]) -> list[FakeHandle]:
        assert len(arguments) == self.world_size
        self.world.tick()
        self.bytes_sent += len(arguments)
        given = zip(self.ranks, arguments, strict=True)
        return [rank.take(method.__name__, each) for rank, each in given if each is not None]

    def collect(self, handles: Sequence[FakeHandle]) -> list[Any]:
        self.world.tick()
        while True:
            failed = next((handle for handle in handles if handle.state == "failed"), None)
            if failed is not None:
                raise self._explained(failed, handles)
            pending = [handle for handle in handles if handle.state == "pending"]
            if not pending:
                break
            if not self.world.run_until(_any_came(pending), self.world.now + TIMEOUT):
                raise Late(f"no answer within {TIMEOUT:g} s", where="; ".join(handle.asked for handle in pending), fix="see")
        return [handle.record for handle in handles]

    def alive(self) -> bool:
        self.world.tick()
        return not any(rank.dead for rank in self.ranks)

    def intact(self, handles: Sequence[FakeHandle]) -> bool:
        return all(handle.state == "pending" or (handle.state == "done" and handle.kept) for handle in handles)

    def begin_rebuild(self) -> None:
        self.world.tick()
        self.world.counts["rebuilt"] += 1
        self.close()
        self._start()
        if self.world.bad_starts.get(self.name, 0):
            self.world.bad_starts[self.name] -= 1
            self.world.counts["bad starts"] += 1
            self.world.at(0.2 * LOADING, lambda doomed=self.ranks[-1]: doomed.die(False))

    def finish_start(self) -> None:
        self.world.run_until(lambda: any(rank.dead for rank in self.ranks), self._loaded)
        for rank in self.ranks:
            if rank.dead:
                raise rank.death()

    def census(self) -> list[RankReport]:
        self.world.tick()
        return [
            RankReport(rank.number, not rank.dead, "here", rank.current.method if rank.current else "", rank.calls, 1.0, "")
            for rank in self.ranks
        ]

    def close(self) -> None:
        for rank in self.ranks:
            if not rank.dead:
                rank.die(False)

    def _start(self) -> None:
        self.generation = next(self.world.numbers)
        self._loaded = self.world.now + self.world.rng.uniform(0.5, 1.0) * LOADING
        self.ranks = [FakeRank(self, number, self._build(self, number)) for number in range(self.world_size)]

    def _explained(self, failed: FakeHandle, handles: Sequence[FakeHandle]) -> Exception:
        assert failed.error is not None
        groups = {handle.rank.group.name: handle.rank.group for handle in handles}.values()
        if isinstance(failed.error, Lost) or all(group.alive() for group in groups):
            return failed.error
        return Lost(f"others noticed: {failed.error}", where=self.name, fix="look")


def _any_came(pending: Sequence[FakeHandle]) -> Callable[[], bool]:
    return lambda: any(handle.state != "pending" for handle in pending)


def _handles(value: Any) -> Iterable[FakeHandle]:
    if isinstance(value, FakeHandle):
        yield value
    elif type(value) in (tuple, list):
        for item in value:
            yield from _handles(item)


def _delivered(value: Any) -> Any:
    if isinstance(value, FakeHandle):
        return value.payload
    return type(value)(_delivered(item) for item in value) if type(value) in (tuple, list) else value
