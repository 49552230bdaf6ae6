"""Writing a skipped optimizer step down where its tensors are (law 7): every rank its rows, rank 0 the weights and the seal."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.loading import dump_config
from rlhf_dist.config.section import Section
from rlhf_dist.config.stages import stage_of_config
from rlhf_dist.contracts.engine import Engine
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.contracts.roles import NOT_WRITTEN
from rlhf_dist.runs.capsule import MODEL, TRAINED, Facts, Part, seal, write_part
from rlhf_dist.runs.capsule_rows import NumberedRow
from rlhf_dist.workers.export import collected, export_model

FAULTS = (OSError, SafetensorError, UserError)


class CapsuleWriter:
    """Writes capsules (`runs.capsule`) of one model.

    Args:
        engine: where the weights are.
        tokenizer: saved beside them.
        config: of the run.
    """

    def __init__(self, engine: Engine, tokenizer: Any, config: Section) -> None:
        self._engine, self._tokenizer, self._config = engine, tokenizer, dump_config(config)
        self.stage = stage_of_config(config)

    def write(self, folder: Path, facts: Facts, part: Part, rows: ExperienceBatch | Sequence[NumberedRow]) -> str:
        """Collective. A disk that is full costs the capsule, not the run.

        Args:
            folder: replaced where it exists.
            facts: the same on every rank.
            part: this rank's, of its rows.
            rows: this rank's.

        Returns:
            The folder, or why there is no capsule.
        """
        engine, refused = self._engine, ""
        if engine.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        engine.any_rank(False)  # nobody writes before it is gone
        for write in (lambda: write_part(folder, engine.rank, part, rows), lambda: self._weights(folder)):
            try:
                write()
            except FAULTS as error:  # only after what is collective
                refused = refused or f"{NOT_WRITTEN} on rank {engine.rank}: {error}"
        elsewhere = engine.any_rank(bool(refused))
        if engine.rank == 0 and not elsewhere:
            try:
                seal(folder, facts, engine.world_size, self._config)
            except FAULTS as error:
                refused = f"{NOT_WRITTEN}: {error}"
        if engine.rank == 0 and (refused or elsewhere):
            shutil.rmtree(folder, ignore_errors=True)
        return refused or (f"{NOT_WRITTEN} on another rank" if elsewhere else str(folder))

    def _weights(self, folder: Path) -> None:
        model = self._engine.module.model
        if not hasattr(model, "peft_config"):
            export_model(self._engine, model, self._tokenizer, str(folder / MODEL))
            return
        trained = collected(self._engine, merged=False)  # as they are: merged, they would be rounded
        if self._engine.rank == 0:
            save_file(trained, folder / TRAINED)
