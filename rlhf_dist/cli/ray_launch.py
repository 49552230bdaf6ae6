"""A stage under Ray: the coordinator in an actor beside this process, the engines in groups of actors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_dist.cli.interrupts import naming
from rlhf_dist.cli.programs import Program
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.progress import BufferedReporter, ConsoleReporter, Event, replay
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.workers.placement import Demand, Node, check_placement
from rlhf_dist.workers.ray_group import RayGroup, get

POLL_S = 0.3


def run_under_ray(program: Program) -> Path:
    """Runs on the cluster of RAY_ADDRESS, or on one that is started here and ended after the run; returns the run folder.

    Raises:
        UserError: anything the user can mend.
    """
    program.check()
    run = program.config.run
    with cluster(program.demands()):
        check_placement(program.demands(), cluster_nodes())
        root = RunFolder.create(run.output_dir, run.name, run.overwrite).root
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote: Any = ray.remote(CoordinatorActor)
        actor = remote.options(num_cpus=0, max_concurrency=2, scheduling_strategy=here).remote(program, str(root), os.getcwd())
        reporter = ConsoleReporter()
        try:
            with naming(root):
                _follow(actor, actor.run.remote(), reporter)
        finally:
            reporter.close()
            ray.kill(actor)
    return root


class CoordinatorActor:
    """The coordinator's process. `events` answers while `run` runs (two threads)."""

    def __init__(self, program: Program, root: str, folder: str) -> None:
        os.chdir(folder)
        self._program, self._root = program, root
        self._reporter = BufferedReporter()

    def run(self) -> dict[str, Any]:
        """The whole run; returns the summary. The groups end with it, whatever happens."""
        with closing(Recorder(RunFolder.open(self._root))) as recorder, ray_groups(self._program) as groups:
            return self._program.run(groups, recorder, self._reporter)

    def events(self, since: int) -> list[Event]:
        """Progress since an event number."""
        return self._reporter.drain(since)


@contextmanager
def ray_groups(program: Program) -> Iterator[dict[str, RayGroup]]:
    """The run's groups by role, placed and loaded side by side (or one after the other), and ended at the end."""
    groups: dict[str, RayGroup] = {}
    try:
        for demand in program.demands():
            groups[demand.role] = RayGroup(demand, program.factory(demand.role), program.config.placement)
        for together in [[group] for group in groups.values()] if program.loads_in_turn else [list(groups.values())]:
            for group in together:
                group.begin_start()
            for group in together:
                group.finish_start()
        yield groups
    finally:
        for group in groups.values():
            group.close()


@contextmanager
def cluster(wanted: Sequence[Demand]) -> Iterator[None]:
    """Connects to RAY_ADDRESS, or starts a local cluster with as many CPUs as the run asks for: ranks share cores on a small machine."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**options)
    else:
        asked = sum(demand.cpus * demand.ranks for demand in wanted)
        ray.init(address="local", num_cpus=max(math.ceil(asked), os.cpu_count() or 1), include_dashboard=False, **options)
    try:
        yield
    finally:
        ray.shutdown()


def cluster_nodes() -> list[Node]:
    """The machines of the cluster."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive]


def _follow(actor: Any, run: Any, reporter: ConsoleReporter) -> None:
    seen = 0
    done: list[Any] = []
    while not done:
        done, _ = ray.wait([run], timeout=POLL_S)
        if not done:
            seen += _replay(actor, seen, reporter)
    try:
        get(run, POLL_S, "coordinator")
    finally:
        _replay(actor, seen, reporter)


def _replay(actor: Any, seen: int, reporter: ConsoleReporter) -> int:
    events = get(actor.events.remote(seen), 60.0, "coordinator, events")
    replay(events, reporter)
    return len(events)
