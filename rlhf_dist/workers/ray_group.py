"""A worker group of Ray actors: placed together, started together, called with references, every wait with a deadline."""

from __future__ import annotations

import os
import pickle
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.experimental import get_object_locations
from ray.util.placement_group import get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_dist.config.errors import UserError, first_line
from rlhf_dist.config.operation import PlacementSection
from rlhf_dist.contracts.group import Late, Lost, RankReport
from rlhf_dist.workers.heartbeat import Heartbeat
from rlhf_dist.workers.host import Factory, Host
from rlhf_dist.workers.interpreter import python_path
from rlhf_dist.workers.placement import Demand
from rlhf_dist.workers.wire import pack

PASSED_ON = (
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "TRANSFORMERS_OFFLINE",
    "DS_ACCELERATOR",
    "PYTHONPATH",
    "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
)
PASSED_ON_PREFIXES = ("VLLM_",)
DIED = "look for the cause in the Ray logs (out of memory is the usual one) and go on with run.resume=auto"
CENSUS_S = 5.0
INLINED = 100 * 2**10
"""Up to so many bytes Ray keeps an object with whoever asked for it."""


@dataclass(frozen=True)
class RayHandle:
    """An answer on its way: the payload's reference, the record's reference, and who is asked."""

    payload: Any
    record: Any
    asked: str
    timeout_s: float
    group: RayGroup

    def info(self) -> Any:
        """The record, waited for."""
        data: bytes = get(self.record, self.timeout_s, self.asked)
        self.group.bytes_received += len(data)
        return pickle.loads(data)


class RayGroup:
    """Ranks of one role as actors (contracts.group.SupervisedGroup).

    Args:
        demand: ranks and resources.
        factory: makes the worker in each actor.
        placement: strategy, deadlines, threads.
        label: of the run, so that what it reserved can be found when its owner has died (`release`).
    """

    def __init__(self, demand: Demand, factory: Factory, placement: PlacementSection, label: str = "") -> None:
        self.name, self.world_size = demand.role, demand.ranks
        self.bytes_sent = self.bytes_received = 0
        self._demand, self._factory, self._placement = demand, factory, placement
        self._timeout_s = placement.call_timeout_s
        self._closed = False
        self._actors: list[Any] = []
        self._starting: list[Any] = []
        self._heartbeat: Heartbeat | None = None
        self._bundles = placement_group(
            [{"CPU": demand.cpus} | ({"GPU": demand.gpus} if demand.gpus else {})] * demand.ranks,
            demand.strategy,
            name=_reservation(label, demand.role) if label else "",
        )
        self._place()

    def begin_start(self) -> None:
        """Tells every rank to load, without waiting, so that groups load side by side."""
        start_timeout_s = self._placement.start_timeout_s
        address, port = get(self._actors[0].address.remote(), start_timeout_s, f"{self.name}, start")
        places = [(rank, self.world_size, address, port) for rank in range(self.world_size)]
        given = (self._factory, self._demand.alone, self._timeout_s)
        self._starting = [actor.start.remote(place, *given) for actor, place in zip(self._actors, places, strict=True)]
        self._heartbeat = Heartbeat(self.name, self._actors, self._placement.heartbeat_s, self._placement.heartbeat_timeout_s)

    def finish_start(self) -> None:
        """Waits until every rank has loaded its models.

        Raises:
            UserError: what a rank raised, or the deadline passed.
            Lost: a rank died.
        """
        asked = {reference: f"{self.name} rank {rank}, start" for rank, reference in enumerate(self._starting)}
        with self._explaining([self]):
            wait_all(asked, self._placement.start_timeout_s)

    def begin_rebuild(self) -> None:
        """Ends all ranks, and has new ones load their models where there is room.

        Raises:
            UserError: there is no room.
        """
        self._end()
        self._place()
        self.begin_start()

    def submit(self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...] | None]) -> list[RayHandle]:
        """Calls a method on every rank that is given arguments; never waits."""
        assert len(arguments) == self.world_size, f"{self.name} has {self.world_size} ranks, got arguments for {len(arguments)}"
        return [self._send(rank, method.__name__, given) for rank, given in enumerate(arguments) if given is not None]

    def collect(self, handles: Sequence[RayHandle]) -> list[Any]:
        """The records, in order. The first failure is raised as soon as it is known, even if another rank never answers.

        The handles may be those of several groups: a rank that waits for one of another group hides no failure there.

        Raises:
            Lost: a process died or is late, or what it kept is gone; also where that shows as an error of the ranks that waited for it.
            UserError: the worker's own.
        """
        with self._explaining({handle.group.name: handle.group for handle in handles}.values()):
            wait_all({handle.record: handle.asked for handle in handles}, self._timeout_s)
            return [handle.info() for handle in handles]

    def alive(self) -> bool:
        """Whether every rank gives a sign of life, within the heartbeat's timeout."""
        pulses = [actor.pulse.remote() for actor in self._actors]
        try:
            ray.get(pulses, timeout=self._placement.heartbeat_timeout_s)
        except RayError:
            return False
        return True

    def intact(self, handles: Sequence[RayHandle]) -> bool:
        """Whether what stands behind the handles is there, or still on its way from a living process; never waits for it."""
        records = [handle.record for handle in handles]
        done, _ = ray.wait(records, num_returns=len(records), timeout=0) if records else ([], [])
        try:
            ray.get(done, timeout=self._timeout_s)
        except Exception:
            return False
        kept = [handle.payload for handle in handles if handle.record in done]
        return all(_is_kept(place) for place in get_object_locations(kept).values()) if kept else True

    def census(self) -> list[RankReport]:
        """What every rank is at; one that does not say within five seconds gives no sign of life."""
        asked = [actor.report.remote(rank) for rank, actor in enumerate(self._actors)]
        reports = []
        for rank, reference in enumerate(asked):
            try:
                reports.append(ray.get(reference, timeout=CENSUS_S))
            except RayError as error:
                reports.append(RankReport(rank, False, type(error).__name__))
        return reports

    def processes(self) -> list[int]:
        """The process numbers of the ranks, each on its own machine."""
        return list(ray.get([actor.pulse.remote() for actor in self._actors], timeout=self._placement.heartbeat_timeout_s))

    def close(self) -> None:
        """Ends the actors and gives their resources back."""
        if self._closed:
            return
        self._closed = True
        self._end()
        remove_placement_group(self._bundles)

    def _place(self) -> None:
        timeout_s, demand = self._placement.start_timeout_s, self._demand
        if not self._bundles.wait(timeout_s):
            self.close()
            raise UserError(
                f"Ray did not place the {demand.ranks} ranks of {demand.role} within {timeout_s:g} s",
                where="placement",
                fix="other jobs may hold the resources (`ray status`); free them, or raise placement.start_timeout_s",
            )
        self._actors = [self._actor(demand, rank, self._placement.threads_per_rank) for rank in range(demand.ranks)]

    def _end(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.stop()
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    @contextmanager
    def _explaining(self, groups: Iterable[RayGroup]) -> Iterator[None]:
        """An error is only what others noticed of it where a process of these groups is gone: that is said instead."""
        try:
            yield
        except Lost as lost:
            reasons = [group._heartbeat.reason for group in groups if group._heartbeat is not None]
            raise next((Lost(reason, where=lost.where, fix=DIED) for reason in reasons if reason), lost) from None
        except Exception as error:
            gone = [group.name for group in groups if not group.alive()]
            if not gone:
                raise
            what = f"a worker process of {', '.join(gone)} is gone; others noticed it: {first_line(error)}"
            raise Lost(what, where=", ".join(gone), fix=DIED) from error

    def _send(self, rank: int, method: str, arguments: tuple[Any, ...]) -> RayHandle:
        data, references = pack(arguments, lambda value: value.payload if isinstance(value, RayHandle) else None)
        self.bytes_sent += len(data)
        payload, record = self._actors[rank].invoke.remote(method, data, *references)
        return RayHandle(payload, record, f"{self.name} rank {rank}, {method}", self._timeout_s, self)

    def _actor(self, demand: Demand, rank: int, threads: int) -> Any:
        variables = {name: value for name, value in os.environ.items() if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)}
        variables |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if not demand.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ""  # or Ray leaves every GPU of the node in sight, reserved by others
        options: dict[str, Any] = {
            "num_cpus": demand.cpus,
            "num_gpus": demand.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._bundles, placement_group_bundle_index=rank),
            "runtime_env": {"env_vars": variables},
        }
        if demand.python:
            variables["PYTHONPATH"] = python_path(variables.get("PYTHONPATH", ""))
            options["runtime_env"]["py_executable"] = shlex.quote(demand.python)
        return Host.options(**options).remote(os.getcwd())  # type: ignore[attr-defined]


def release(label: str, wanted: Sequence[Demand]) -> None:
    """Gives back what groups reserved whose owner has died: Ray keeps that until the whole job ends."""
    for demand in wanted:
        with suppress(ValueError):  # it was never reserved
            remove_placement_group(get_placement_group(_reservation(label, demand.role)))


def _reservation(label: str, role: str) -> str:
    return f"{label} {role}"


def wait_all(asked: Mapping[Any, str], timeout_s: float) -> None:
    """Waits for all; raises the first failure at once, so that a rank hanging in a collective with a dead one hides nothing.

    Args:
        asked: references, and who was asked for what.

    Raises:
        UserError: a failure. Lost: a death, or the deadline.
    """
    pending = list(asked)
    while pending:
        done, pending = ray.wait(pending, num_returns=1, timeout=timeout_s)
        if not done:
            raise _late(timeout_s, "; ".join(asked[reference] for reference in pending))
        for reference in done:
            get(reference, timeout_s, asked[reference])


def get(reference: Any, timeout_s: float, asked: str) -> Any:
    """A value, or the error behind it in plain words.

    Raises:
        UserError: the worker's own UserError.
        Lost: a dead process, what it kept is gone with it, or the deadline.
        Exception: any other error of the worker, as it was.
    """
    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError:
        raise _late(timeout_s, asked) from None
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, RayError):  # what it was given came from a process that died
            raise Lost(f"a worker process died: {first_line(cause)}", where=asked, fix=DIED) from None
        raise
    except RayActorError as error:
        raise Lost(f"a worker process died: {first_line(error)}", where=asked, fix=DIED) from None
    except RayError as error:
        raise Lost(f"Ray failed: {first_line(error)}", where=asked, fix="see `ray status` and the Ray logs") from None


def _is_kept(place: Mapping[str, Any]) -> bool:
    """Small objects live with whoever asked, and have no place; larger ones on machines, of which one must be left."""
    return bool(place["node_ids"]) or place["object_size"] is None or place["object_size"] <= INLINED


def _late(timeout_s: float, asked: str) -> Late:
    return Late(
        f"no answer within {timeout_s:g} s",
        where=asked,
        fix="a rank may hang or be slow: see the Ray logs, or raise placement.call_timeout_s (start_timeout_s while ranks load)",
    )
