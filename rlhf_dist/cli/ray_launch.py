"""PPO under Ray: the coordinator in an actor beside this process, the engines in groups of actors."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_dist.cli.checks import check_run
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.coordinator.ppo import PPOCoordinator
from rlhf_dist.coordinator.shards import Groups
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.progress import BufferedReporter, ConsoleReporter, Event, replay
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.workers.placement import Node, check_placement, demands
from rlhf_dist.workers.ray_group import RayGroup, get
from rlhf_dist.workers.roles import build_worker

POLL_S = 0.3


def run_under_ray(config: PPOConfig) -> Path:
    """Runs on the cluster of RAY_ADDRESS, or on one that is started here and ended after the run; returns the run folder.

    Raises:
        UserError: anything the user can mend.
    """
    check_run(config)
    with cluster(config):
        check_placement(demands(config), cluster_nodes())
        root = RunFolder.create(config.run.output_dir, config.run.name, config.run.overwrite).root
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote: Any = ray.remote(CoordinatorActor)
        actor = remote.options(num_cpus=0, max_concurrency=2, scheduling_strategy=here).remote(config, str(root), os.getcwd())
        reporter = ConsoleReporter()
        try:
            _follow(actor, actor.run.remote(), reporter)
        finally:
            reporter.close()
            ray.kill(actor)
    return root


class CoordinatorActor:
    """The coordinator's process. `events` answers while `run` runs (two threads)."""

    def __init__(self, config: PPOConfig, root: str, folder: str) -> None:
        os.chdir(folder)
        self._config, self._root = config, root
        self._reporter = BufferedReporter()

    def run(self) -> dict[str, Any]:
        """The whole run; returns the summary. The groups end with it, whatever happens."""
        with closing(Recorder(RunFolder.open(self._root))) as recorder, ray_groups(self._config) as groups:
            return PPOCoordinator(self._config, groups, recorder, self._reporter).run()

    def events(self, since: int) -> list[Event]:
        """Progress since an event number."""
        return self._reporter.drain(since)


@contextmanager
def ray_groups(config: PPOConfig) -> Iterator[Groups]:
    """The run's groups, placed and loaded side by side, and ended at the end."""
    groups: dict[str, Any] = {}
    try:
        for demand in demands(config):
            groups[demand.role] = RayGroup(demand, functools.partial(build_worker, demand.role, config), config.placement)
        for group in groups.values():
            group.begin_start()
        for group in groups.values():
            group.finish_start()
        yield Groups(**groups)
    finally:
        for group in groups.values():
            group.close()


@contextmanager
def cluster(config: PPOConfig) -> Iterator[None]:
    """Connects to RAY_ADDRESS, or starts a local cluster with as many CPUs as the run asks for: ranks share cores on a small machine."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**options)
    else:
        asked = sum(demand.cpus * demand.ranks for demand in demands(config))
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
