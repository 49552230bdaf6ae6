"""One rank of a supervised stage: rows it has read itself, an engine, an objective (contracts.supervised.SupervisedRole)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf_dist.contracts.engine import Objective
from rlhf_dist.contracts.roles import UpdateInfo, UpdateRequest
from rlhf_dist.contracts.supervised import RowFacts
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.engines.deepspeed import DeepSpeedEngine
from rlhf_dist.models.flops import flops_of, forward_flops, training_flops
from rlhf_dist.runs.capsule_rows import NumberedRow
from rlhf_dist.workers.capsules import CapsuleWriter
from rlhf_dist.workers.export import export_model
from rlhf_dist.workers.saving import SavedWorker
from rlhf_dist.workers.steps import Steps
from rlhf_dist.workers.training import parameter_counts


@dataclass(frozen=True)
class Rows:
    """Training and held-out rows, each with a length and a weight; `fates` counts those that were dropped or cut, by reason, and
    `eval_fates` those of them on the held-out side."""

    train: Sequence[Any]
    evaluation: Sequence[Any]
    fates: dict[str, int] = field(default_factory=dict)
    eval_fates: dict[str, int] = field(default_factory=dict)


class SupervisedWorker(SavedWorker):
    """Trains an engine's module on rows by number.

    Args:
        engine: trained engine.
        objective: its loss, a sum over units; `rows` have their numbers as `weight`.
        rows: the same on every rank.
        collate: rows → what the engine's module takes.
        tokenizer: saved beside the exported weights.
        capsules: writes skipped steps down; None where none are.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        objective: Objective,
        rows: Rows,
        collate: Callable[[Sequence[Any]], Any],
        tokenizer: Any,
        capsules: CapsuleWriter | None = None,
    ) -> None:
        self._engine, self._objective, self._rows, self._collate, self._tokenizer = engine, objective, rows, collate, tokenizer
        self._training_costs = training_flops(engine.module)
        self._steps = Steps(engine, objective, "model", capsules)

    def describe(self) -> RowFacts:
        """Lengths and weights of all rows."""
        return RowFacts(
            lengths=tuple(len(row) for row in self._rows.train),
            weights=tuple(float(row.weight) for row in self._rows.train),
            eval_lengths=tuple(len(row) for row in self._rows.evaluation),
            fates=self._rows.fates,
            eval_fates=self._rows.eval_fates,
            facts=parameter_counts(self._engine.module) | {"device": str(self._engine.device)},
            costs=forward_flops(self._engine.module),
        )

    def update(self, request: UpdateRequest) -> UpdateInfo:
        """One optimizer step on this rank's microbatches."""
        began, train = time.perf_counter(), self._rows.train
        cuts = self._cuts(train, request.microbatches)
        batches = [self._collate([train[row] for row in rows]) for rows in cuts]
        self._steps.begin()
        taken = self._steps.take(batches, request.denominator)
        seconds = time.perf_counter() - began
        tally = Tally() if taken.info.skipped else taken.tally  # of nothing that was learnt, and not finite
        if batches:
            tally.add("perf/update_tflops", flops_of(self._training_costs, batches) / 1e12, seconds)
        fault, capsule = self._steps.look(request, taken, cuts, lambda rows: [NumberedRow(row, train[row]) for row in rows])
        return UpdateInfo(tally, taken.info, seconds, fault, capsule, taken.unsound)

    def evaluate(self, microbatches: tuple[tuple[int, ...], ...]) -> Tally:
        """Metrics of held-out rows."""
        batches = [self._collate(rows) for rows in self._cut(self._rows.evaluation, microbatches)]
        tally = Tally()
        with torch.no_grad():
            for batch, outputs in zip(batches, self._engine.forward(batches), strict=True):
                tally.merge(self._objective(outputs, batch)[1])
        return tally

    def export(self, folder: str) -> None:
        """Writes the model as a Hugging Face folder, adapters merged."""
        export_model(self._engine, self._engine.module.model, self._tokenizer, folder)

    def _cut(self, source: Sequence[Any], microbatches: tuple[tuple[int, ...], ...]) -> list[list[Any]]:
        """The rows of each microbatch."""
        return [[source[row] for row in rows] for rows in self._cuts(source, microbatches)]

    def _cuts(self, source: Sequence[Any], microbatches: tuple[tuple[int, ...], ...]) -> list[tuple[int, ...]]:
        """The row numbers of each microbatch as it is really done; empty ones count for nothing."""
        return [rows for rows in microbatches if rows]
