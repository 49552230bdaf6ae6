"""One optimizer step of an engine, and what is left of it where it was skipped: the same for policy, value and supervised stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_dist.contracts.engine import Engine, Objective, Outputs, StepInfo
from rlhf_dist.contracts.experience import ExperienceBatch, SequenceBatch
from rlhf_dist.contracts.roles import Fault, UpdateRequest
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.runs.capsule import Facts, Part
from rlhf_dist.runs.capsule_rows import NumberedRow
from rlhf_dist.workers.capsules import CapsuleWriter

Select = Callable[[Sequence[int]], ExperienceBatch | Sequence[NumberedRow]]
"""Rows by number, as a capsule holds them."""


@dataclass(frozen=True)
class Taken:
    """An optimizer step. tally: what this rank's microbatches counted. losses: of each. unsound: a weight that is not finite, or empty."""

    tally: Tally
    info: StepInfo
    losses: tuple[float, ...]
    unsound: str


class Steps:
    """Takes optimizer steps, and writes down those that are skipped because something is not finite.

    Args:
        engine: trained engine.
        objective: its loss.
        role: in capsules.
        capsules: writes them; None where none are.
    """

    def __init__(self, engine: Engine, objective: Objective, role: str, capsules: CapsuleWriter | None = None) -> None:
        self._engine, self._objective, self._role = engine, objective, role
        self._capsules, self._written = capsules, 0

    def begin(self) -> None:
        """From now on `UpdateRequest.capsules` counts anew."""
        self._written = 0

    def take(self, microbatches: Sequence[Any], denominator: float) -> Taken:
        """One step on this rank's microbatches. Collective."""
        losses: list[float] = []
        tally = self._engine.forward_backward(microbatches, _recording(self._objective, losses), denominator)
        info = self._engine.optimizer_step()
        return Taken(tally, info, tuple(losses), self._engine.unsound_weights())

    def look(self, request: UpdateRequest, taken: Taken, cuts: Sequence[Sequence[int]], select: Select) -> tuple[Fault, str]:
        """What was not finite, on any rank, and where that was written down. Collective where the step was skipped, which all ranks know.

        Args:
            request: whose step it was.
            taken: what came out.
            cuts: row numbers of each microbatch, none of which is empty.
            select: gives the rows.

        Returns:
            The fault, the same on all ranks, and a folder, or why there is none; both empty where nothing is wrong.
        """
        fault = self._fault(taken)
        if not fault or self._engine.any_rank(bool(taken.unsound)):  # the weights of such a moment are no start for a replay
            return fault, ""
        if self._capsules is None or not request.capsule or self._written >= request.capsules:
            return fault, ""
        self._written += 1
        facts = Facts(self._capsules.stage, self._role, fault, request.denominator, taken.info.grad_norm, taken.info.lr)
        part = Part(tuple(_places(cuts)), taken.losses)
        return fault, self._capsules.write(Path(request.capsule), facts, part, select([row for rows in cuts for row in rows]))

    def _fault(self, taken: Taken) -> Fault:
        if not taken.info.skipped:
            return ""
        if self._engine.any_rank(not all(map(math.isfinite, taken.losses))):
            return "loss"
        return "" if taken.info.overflow else "gradient"


def _places(cuts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Where the rows of each microbatch stand when all are written one after the other."""
    starts = [sum(map(len, cuts[:number])) for number in range(len(cuts))]
    return [tuple(range(start, start + len(rows))) for start, rows in zip(starts, cuts, strict=True)]


def _recording(objective: Objective, losses: list[float]) -> Objective:
    """The same objective; each loss is also put into a list."""

    def recorded(outputs: Outputs, microbatch: SequenceBatch) -> tuple[Tensor, Tally]:
        loss, tally = objective(outputs, microbatch)
        losses.append(float(loss.detach()))
        return loss, tally

    return recorded
