"""The Ray cluster of a run: that of RAY_ADDRESS, or one of its own (which nobody else can join: `launching.with_a_token`)."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError

from rlhf_dist.config.errors import UserError, first_line
from rlhf_dist.workers.placement import Demand, Node

CONNECT_S = 10.0


@contextmanager
def cluster(wanted: Sequence[Demand]) -> Iterator[None]:
    """Connects to RAY_ADDRESS, or starts a local cluster with as many CPUs as the run asks for: ranks share cores on a small machine.

    Raises:
        UserError: the cluster of RAY_ADDRESS cannot be joined.
    """
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _join(address, options)
    else:
        asked = sum(demand.cpus * demand.ranks for demand in wanted)
        ray.init(address="local", num_cpus=max(math.ceil(asked), os.cpu_count() or 1), include_dashboard=False, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str, options: dict[str, Any]) -> None:
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdigit() and "/" not in host:  # Ray itself tries for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        ray.init(**options)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        fix = (
            "see that it is up (`ray status`); one that asks for a token (Ray makes a token file for it) needs RAY_AUTH_MODE=token here too"
        )
        raise UserError(f"cannot join the Ray cluster at {address}: {first_line(error)}", where="RAY_ADDRESS", fix=fix) from None


def cluster_nodes() -> list[Node]:
    """The machines of the cluster."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive]
