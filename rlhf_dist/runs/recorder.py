"""What a run writes, in one place; on ranks that write nothing, the same object without a folder."""

from __future__ import annotations

from typing import Any

from rlhf_dist.config.loading import dump_config
from pydantic import BaseModel
from rlhf_dist.runs.checkpoints import CheckpointStore
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.metrics import MetricsWriter
from rlhf_dist.runs.state import RunState
from rlhf_dist.runs.summary import write_summary


class Recorder:
    """Writes a run folder.

    Args:
        folder: None on all ranks but the first of the deepspeed launcher.
    """

    def __init__(self, folder: RunFolder | None) -> None:
        self.folder = folder
        self._metrics = MetricsWriter(folder) if folder else None
        self._checkpoints = CheckpointStore(folder.checkpoints) if folder else None

    def config(self, config: BaseModel) -> None:
        """Saves the resolved config."""
        if self.folder:
            self.folder.write_config(dump_config(config))

    def metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Appends a step's metrics."""
        if self._metrics:
            self._metrics.write(step, metrics)

    def rollouts_path(self, step: int) -> str:
        """Where the samples of a step go."""
        return str(self.folder.rollouts_path(step)) if self.folder else ""

    def evaluation_path(self, step: int) -> str:
        """Where the held-out samples go."""
        return str(self.folder.evaluation_path(step)) if self.folder else ""

    def begin_checkpoint(self, step: int) -> str:
        """An empty folder for a checkpoint's models."""
        return str(self._checkpoints.begin(step)) if self._checkpoints else ""

    def publish_checkpoint(self, state: RunState, keep: int) -> None:
        """Makes the begun checkpoint count, and lets old ones go."""
        if self._checkpoints:
            self._checkpoints.publish(state.step, state.to_dict())
            self._checkpoints.prune(keep)

    def export_path(self, role: str) -> str:
        """Where a final model goes."""
        return str(self.folder.export / role) if self.folder else ""

    def report_path(self) -> str:
        """Where a report goes."""
        return str(self.folder.report) if self.folder else ""

    def summary(self, summary: dict[str, Any]) -> None:
        """Writes summary.json."""
        if self.folder:
            write_summary(self.folder.summary, summary)

    def close(self) -> None:
        """Closes the files. A run that ended before it recorded a metric leaves its folder empty, for the next try. Safe to call twice."""
        if self._metrics:
            self._metrics.close()
        if self.folder:
            self.folder.clear_unused()
