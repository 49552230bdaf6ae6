"""The Ray cluster of a run: that of RAY_ADDRESS, or one of its own (which nobody else can join: `launching.with_a_token`)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from rlhf_dist.workers.placement import Demand, Node


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
