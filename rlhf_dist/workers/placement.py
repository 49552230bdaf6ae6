"""Where ranks may live: what each group asks of the cluster, and why a wish can never be met."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.workers.roles import ROLLOUT, needed_roles, section_of

EPSILON = 1e-9  # shares such as 0.1 are not exact


@dataclass(frozen=True)
class Demand:
    """A group's wish: `ranks` bundles of CPUs and GPUs, packed or spread.

    alone: its ranks form no process group. python: the interpreter they run in, empty for this one.
    """

    role: str
    ranks: int
    cpus: float
    gpus: float
    strategy: str
    alone: bool = False
    python: str = ""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    cpus: float
    gpus: float

    def holds(self, demand: Demand) -> int:
        """How many of a group's ranks fit on this node alone. A share of a GPU never spans two of them."""
        by_cpu = int(self.cpus / demand.cpus + EPSILON)
        if not demand.gpus:
            return by_cpu
        if demand.gpus < 1:
            return min(by_cpu, int(self.gpus + EPSILON) * int(1 / demand.gpus + EPSILON))
        return min(by_cpu, int(self.gpus / demand.gpus + EPSILON))


def demands(config: PPOConfig) -> list[Demand]:
    """What a run asks for, a group at a time."""
    strategy = config.placement.strategy
    sections = [(role, section_of(config, role)) for role in needed_roles(config)]
    wanted = [Demand(role, s.ranks, s.cpus_per_rank, s.gpus_per_rank, strategy) for role, s in sections]
    r = config.rollout
    sampling = [Demand(ROLLOUT, r.ranks, r.cpus_per_rank, r.gpus_per_rank, strategy, alone=True, python=r.python)] if r.ranks else []
    return wanted + sampling


def check_placement(wanted: Sequence[Demand], nodes: Sequence[Node]) -> None:
    """Refuses what the cluster can never schedule, before anything is started.

    It looks at the sums and at each group alone: how groups of several machines fit beside each other, only Ray finds out.

    Raises:
        UserError: too few CPUs or GPUs in all, a rank that fits on no node, a number of GPUs that Ray does not give, or a strategy that
            too few or too small nodes allow.
    """
    for demand in wanted:
        if 0 < demand.gpus < 1 and demand.ranks > 1 and not demand.alone:
            fix = f"give {demand.role} one rank, or whole GPUs: only groups of one rank can share a GPU"
            raise UserError(f"{demand.ranks} ranks of one group may land on one GPU, which NCCL refuses", where=_where(demand), fix=fix)
        if demand.gpus > 1 and demand.gpus != int(demand.gpus):
            fix = f"set {demand.role}.gpus_per_rank to a whole number, or to a share below 1"
            raise UserError(f"a rank cannot have {demand.gpus:g} GPUs", where=_where(demand), fix=fix)
    for name in ("cpus", "gpus"):
        _check_total(name, wanted, nodes)
    _check_devices([demand for demand in wanted if demand.gpus > 0.5], nodes)
    for demand in wanted:
        _check_group(demand, nodes)


def _check_total(name: Literal["cpus", "gpus"], wanted: Sequence[Demand], nodes: Sequence[Node]) -> None:
    asked = sum(getattr(demand, name) * demand.ranks for demand in wanted)
    there = sum(getattr(node, name) for node in nodes)
    if asked > there + EPSILON:
        parts = ", ".join(f"{demand.role} {demand.ranks} × {getattr(demand, name):g}" for demand in wanted)
        what = f"the run asks for {asked:g} {name.upper()[:-1]}s ({parts}), the cluster has {there:g}"
        fix = f"lower *.ranks or *.{name}_per_rank, or start Ray with more (ray start --head --num-{name}={asked:g})"
        raise UserError(what, where="placement", fix=fix)


def _check_devices(unshared: Sequence[Demand], nodes: Sequence[Node]) -> None:
    """Ranks of more than half a GPU cannot share one, whatever the sum says."""
    asked, there = sum(math.ceil(demand.gpus) * demand.ranks for demand in unshared), sum(node.gpus for node in nodes)
    if asked > there + EPSILON:
        parts = ", ".join(f"{demand.role} {demand.ranks} × {demand.gpus:g}" for demand in unshared)
        what = f"ranks of more than half a GPU need {asked} GPUs ({parts}), the cluster has {there:g}"
        raise UserError(what, where="placement", fix="set gpus_per_rank to 0.5 or less where two ranks are to share a GPU")


def _check_group(demand: Demand, nodes: Sequence[Node]) -> None:
    room = [node.holds(demand) for node in nodes]
    usable, role = sum(each > 0 for each in room), demand.role
    if not usable:
        what = f"a rank of {role} needs {demand.cpus:g} CPUs and {demand.gpus:g} GPUs, more than any node has"
        raise UserError(what, where=_where(demand), fix=f"lower {role}.cpus_per_rank or {role}.gpus_per_rank")
    if demand.strategy == "STRICT_PACK" and max(room) < demand.ranks:
        what = f"no single node holds all {demand.ranks} ranks of {role}"
        raise UserError(what, where=_where(demand), fix="use placement.strategy=PACK")
    if demand.strategy == "STRICT_SPREAD" and usable < demand.ranks:
        what = f"{demand.ranks} ranks of {role} need as many nodes, there are {usable}"
        raise UserError(what, where=_where(demand), fix="use placement.strategy=SPREAD")
    if sum(room) < demand.ranks:
        what = f"only {sum(room)} of {demand.ranks} ranks of {role} fit on the nodes"
        raise UserError(what, where=_where(demand), fix=f"lower {role}.ranks")


def _where(demand: Demand) -> str:
    return f"{demand.role}, placement.strategy {demand.strategy}"
