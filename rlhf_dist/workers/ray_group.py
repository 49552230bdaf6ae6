"""A worker group of Ray actors: placed together, started together, called with references, every wait with a deadline."""

from __future__ import annotations

import os
import pickle
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.operation import PlacementSection
from rlhf_dist.workers.interpreter import python_path
from rlhf_dist.workers.placement import Demand
from rlhf_dist.workers.wire import pack, split, unpack

Factory = Callable[[Any], Any]
"""Makes a worker from its `engines.process.Rank`."""

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


class Host:
    """The actor: one rank's process, with one worker in it."""

    def __init__(self, folder: str) -> None:
        if os.path.isdir(folder):
            os.chdir(folder)  # relative paths mean what they meant to the user
        self._worker: Any = None

    def address(self) -> tuple[str, int]:
        """Where the group's ranks can meet, seen from rank 0."""
        from rlhf_dist.engines.process import free_port

        return str(ray.util.get_node_ip_address()), free_port()

    def start(self, place: tuple[int, int, str, int], factory: Factory, alone: bool) -> None:
        """Joins the process group, unless its ranks stand alone, and loads the worker. place: rank, world size, address, port."""
        from rlhf_dist.engines.process import rank_alone, start_process_group

        rank, world_size, address, port = place
        self._worker = factory(rank_alone(rank, world_size) if alone else start_process_group(rank, world_size, 0, address, port))

    @ray.method(num_returns=2)
    def invoke(self, method: str, arguments: bytes, *payloads: Any) -> tuple[Any, bytes]:
        """Calls the worker."""
        return split(getattr(self._worker, method)(*unpack(arguments, payloads)))

    def stop(self) -> None:
        """Leaves the process group."""
        from rlhf_dist.engines.process import stop_process_group

        self._worker = None
        stop_process_group()


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
    """Ranks of one role as actors (contracts.group.WorkerGroup).

    Args:
        demand: ranks and resources.
        factory: makes the worker in each actor.
        placement: strategy, deadlines, threads.
    """

    def __init__(self, demand: Demand, factory: Factory, placement: PlacementSection) -> None:
        self.name, self.world_size = demand.role, demand.ranks
        self.bytes_sent = self.bytes_received = 0
        self._timeout_s = placement.call_timeout_s
        self._closed = False
        self._actors: list[Any] = []
        self._bundles = placement_group(
            [{"CPU": demand.cpus} | ({"GPU": demand.gpus} if demand.gpus else {})] * demand.ranks, demand.strategy
        )
        if not self._bundles.wait(placement.start_timeout_s):
            self.close()
            raise UserError(
                f"Ray did not place the {demand.ranks} ranks of {demand.role} within {placement.start_timeout_s:g} s",
                where="placement",
                fix="other jobs may hold the resources (`ray status`); free them, or raise placement.start_timeout_s",
            )
        self._actors = [self._actor(demand, rank, placement.threads_per_rank) for rank in range(demand.ranks)]
        self._factory, self._start_timeout_s, self._alone = factory, placement.start_timeout_s, demand.alone
        self._starting: list[Any] = []

    def begin_start(self) -> None:
        """Tells every rank to load, without waiting, so that groups load side by side."""
        address, port = get(self._actors[0].address.remote(), self._start_timeout_s, f"{self.name}, start")
        places = [(rank, self.world_size, address, port) for rank in range(self.world_size)]
        self._starting = [actor.start.remote(place, self._factory, self._alone) for actor, place in zip(self._actors, places, strict=True)]

    def finish_start(self) -> None:
        """Waits until every rank has loaded its models.

        Raises:
            UserError: what a rank raised, or the deadline passed.
        """
        asked = {reference: f"{self.name} rank {rank}, start" for rank, reference in enumerate(self._starting)}
        wait_all(asked, self._start_timeout_s)

    def submit(self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...] | None]) -> list[RayHandle]:
        """Calls a method on every rank that is given arguments; never waits."""
        assert len(arguments) == self.world_size, f"{self.name} has {self.world_size} ranks, got arguments for {len(arguments)}"
        return [self._send(rank, method.__name__, given) for rank, given in enumerate(arguments) if given is not None]

    def collect(self, handles: Sequence[RayHandle]) -> list[Any]:
        """The records, in order. The first failure is raised as soon as it is known, even if another rank never answers.

        The handles may be those of several groups: a rank that waits for one of another group hides no failure there.
        """
        wait_all({handle.record: handle.asked for handle in handles}, self._timeout_s)
        return [handle.info() for handle in handles]

    def close(self) -> None:
        """Ends the actors and gives their resources back."""
        if self._closed:
            return
        self._closed = True
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._bundles)

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
        return ray.remote(Host).options(**options).remote(os.getcwd())


def wait_all(asked: Mapping[Any, str], timeout_s: float) -> None:
    """Waits for all; raises the first failure at once, so that a rank hanging in a collective with a dead one hides nothing.

    Args:
        asked: references, and who was asked for what.

    Raises:
        UserError: a failure, or the deadline.
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
        UserError: the worker's own UserError, a dead process, or the deadline.
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
        raise
    except RayActorError as error:
        fix = "look for the cause in the Ray logs (out of memory is the usual one) and start the run again"
        raise UserError(f"a worker process died: {str(error).splitlines()[0]}", where=asked, fix=fix) from None
    except RayError as error:
        raise UserError(f"Ray failed: {str(error).splitlines()[0]}", where=asked, fix="see `ray status` and the Ray logs") from None


def _late(timeout_s: float, asked: str) -> UserError:
    return UserError(
        f"no answer within {timeout_s:g} s",
        where=asked,
        fix="a rank may hang or be slow: see the Ray logs, or raise placement.call_timeout_s (start_timeout_s while ranks load)",
    )
