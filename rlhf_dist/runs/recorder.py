"""What a run writes, in one place; on ranks that write nothing, the same object without a folder."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rlhf_dist.config.errors import UserError, writing
from rlhf_dist.config.loading import dump_config
from rlhf_dist.contracts.engine import SavedFile
from rlhf_dist.runs.atomic import write_text
from rlhf_dist.runs.checkpoints import Checkpoint, CheckpointStore
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.inputs import INPUTS, inputs_text
from rlhf_dist.runs.lineage import CONFIG
from rlhf_dist.runs.metrics import MetricsWriter
from rlhf_dist.runs.summary import write_summary


class Recorder:
    """Writes a run folder.

    Args:
        folder: None where nothing is to be written at all.
        writes: False on all ranks but the first of the deepspeed launcher: they know the paths and write nothing themselves.
    """

    def __init__(self, folder: RunFolder | None, writes: bool = True) -> None:
        self.folder = folder
        self._writes = writes and folder is not None
        self._metrics = MetricsWriter(folder) if folder and writes else None
        self._checkpoints = CheckpointStore(folder.checkpoints) if folder else None

    def config(self, config: BaseModel, resumed: Path | None = None) -> None:
        """Saves the resolved config, and what the run was made from.

        Args:
            resumed: folder of the checkpoint that the run goes on from. It then stands on what it began with, which is in there.
        """
        if not self.folder or not self._writes:
            return
        self.folder.write_config(dump_config(config))
        if resumed is None:
            write_text(self.folder.inputs, inputs_text(config))
        elif (resumed / INPUTS).is_file():
            write_text(self.folder.inputs, (resumed / INPUTS).read_text(encoding="utf-8"))
        else:  # taken before they were kept: what lies there now may be something else
            self.folder.inputs.unlink(missing_ok=True)

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Appends a step's metrics."""
        if self._metrics:
            self._metrics.write(step, metrics)

    @property
    def metrics_position(self) -> int:
        """Bytes of metrics so far; 0 where none are written."""
        return self._metrics.position if self._metrics else 0

    def rewind(self, step: int, position: int) -> str:
        """Forgets everything after a step: metrics after a position, samples, the summary. Returns a warning where metrics are missing."""
        if not self.folder or not self._metrics:
            return ""
        self.folder.forget_after(step)
        return self._metrics.rewind(step, position)

    def rollouts_path(self, step: int) -> str:
        """Where the samples of a step go."""
        return str(self.folder.rollouts_path(step)) if self.folder else ""

    def evaluation_path(self, step: int) -> str:
        """Where the held-out samples go."""
        return str(self.folder.evaluation_path(step)) if self.folder else ""

    def quarantine_path(self) -> str:
        """Where samples go on which a reward failed."""
        return str(self.folder.quarantine) if self.folder else ""

    def capsule_path(self, step: int, role: str, minibatch: int) -> str:
        """Where an optimizer step of a model goes that was skipped; both numbers count from 1."""
        return str(self.folder.capsules / f"step_{step:06d}_{role}_{minibatch:02d}") if self.folder else ""

    def begin_checkpoint(self, step: int) -> str:
        """The folder in which a checkpoint grows; made by whoever writes."""
        if self._checkpoints is None:
            return ""
        with writing(self._checkpoints.partial(step)):
            return str(self._checkpoints.begin(step) if self._writes else self._checkpoints.partial(step))

    def commit_checkpoint(self, step: int, state: dict[str, Any], written: Iterable[SavedFile], keep: int) -> None:
        """Makes the begun checkpoint count, and then lets old ones go.

        Raises:
            UserError: the disk is full, or the files of other machines cannot be seen.
        """
        if self.folder is None or self._checkpoints is None or not self._writes:
            return
        try:
            shutil.copyfile(self.folder.config, self._checkpoints.partial(step) / CONFIG)
            if self.folder.inputs.is_file():
                shutil.copyfile(self.folder.inputs, self._checkpoints.partial(step) / INPUTS)
            if self._metrics:
                self._metrics.sync()
            self._checkpoints.commit(step, state, written)
        except OSError as error:
            what = f"the checkpoint of step {step} could not be written ({error.strerror}); earlier ones are whole"
            raise UserError(what, where=str(self._checkpoints.partial(step)), fix="free space, then go on with run.resume=auto") from None
        with writing(self.folder.checkpoints):
            self._checkpoints.prune(keep, step)

    def newest_checkpoint(self, refused: Callable[[str], None]) -> Checkpoint | None:
        """The newest whole checkpoint of the run.

        Args:
            refused: told of newer ones that are damaged.
        """
        return self._checkpoints.newest(refused) if self._checkpoints else None

    def clear_partial(self) -> None:
        """Removes checkpoints that were left half-written."""
        if self._checkpoints and self._writes:
            self._checkpoints.clear()

    def export_path(self, role: str) -> str:
        """Where a final model goes."""
        return str(self.folder.export / role) if self.folder else ""

    def report_path(self) -> str:
        """Where a report goes."""
        return str(self.folder.report) if self.folder else ""

    def stuck(self, name: str, text: str) -> str:
        """Writes what was seen of stuck processes, beside what was seen earlier; returns the path."""
        if not self.folder:
            return ""
        reports = self.folder.reports
        path = next(path for n in itertools.count(1) if not (path := reports / f"{name}_{n}.txt").exists())
        write_text(path, text)
        return str(path)

    def summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json."""
        if self.folder and self._writes:
            write_summary(self.folder.summary, summary)

    def close(self) -> None:
        """Closes the files. A run that ended before it recorded a metric leaves its folder empty, for the next try. Safe to call twice."""
        if self._metrics:
            self._metrics.close()
        if self.folder and self._writes:
            self.folder.clear_unused()
