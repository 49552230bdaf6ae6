"""Where ranks may live: what each group asks of the cluster, and why a wish can never be met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.workers.roles import needed_roles, section_of


@dataclass(frozen=True)
class Demand:
    """A group's wish: `ranks` bundles of CPUs and GPUs, packed or spread."""

    role: str
    ranks: int
    cpus: float
    gpus: float
    strategy: str


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    cpus: float
    gpus: float

    def holds(self, demand: Demand) -> int:
        """How many of a group's ranks fit on this node alone."""
        by_cpu = int(self.cpus / demand.cpus + 1e-9)
        return by_cpu if not demand.gpus else min(by_cpu, int(self.gpus / demand.gpus + 1e-9))


def demands(config: PPOConfig) -> list[Demand]:
    """What a run asks for, a group at a time."""
    strategy = config.placement.strategy
    sections = [(role, section_of(config, role)) for role in needed_roles(config)]
    return [Demand(role, s.ranks, s.cpus_per_rank, s.gpus_per_rank, strategy) for role, s in sections]


def check_placement(wanted: Sequence[Demand], nodes: Sequence[Node]) -> None:
    """Refuses what the cluster can never schedule, before anything is started.

    Raises:
        UserError: too few CPUs or GPUs in all, a rank that fits on no node, or a strategy that too few or too small nodes allow.
    """
    for name in ("cpus", "gpus"):
        asked = sum(getattr(demand, name) * demand.ranks for demand in wanted)
        there = sum(getattr(node, name) for node in nodes)
        if asked > there + 1e-9:
            parts = ", ".join(f"{d.role} {d.ranks} × {getattr(d, name):g}" for d in wanted)
            fix = f"lower *.ranks or *.{name}_per_rank, or start Ray with more (ray start --head --num-{name}={asked:g})"
            raise UserError(f"the run asks for {asked:g} {name.upper()[:-1]}s ({parts}), the cluster has {there:g}", where="placement", fix=fix)
    for demand in wanted:
        _check_group(demand, nodes)


def _check_group(demand: Demand, nodes: Sequence[Node]) -> None:
    room = [node.holds(demand) for node in nodes]
    where = f"{demand.role}, placement.strategy {demand.strategy}"
    if not any(room):
        each = f"{demand.cpus:g} CPUs and {demand.gpus:g} GPUs"
        raise UserError(f"a rank of {demand.role} needs {each}, more than any node has", where=where, fix="lower cpus_per_rank or gpus_per_rank")
    if demand.strategy == "STRICT_PACK" and max(room) < demand.ranks:
        raise UserError(f"no single node holds all {demand.ranks} ranks of {demand.role}", where=where, fix="use placement.strategy=PACK")
    if demand.strategy == "STRICT_SPREAD" and sum(r > 0 for r in room) < demand.ranks:
        nodes_there = sum(r > 0 for r in room)
        raise UserError(f"{demand.ranks} ranks of {demand.role} need as many nodes, there are {nodes_there}", where=where, fix="use placement.strategy=SPREAD")
    if sum(room) < demand.ranks:
        raise UserError(f"only {sum(room)} of {demand.ranks} ranks of {demand.role} fit on the nodes", where=where, fix=f"lower {demand.role}.ranks")
