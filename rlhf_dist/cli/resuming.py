"""From which checkpoint a run may go on."""

from __future__ import annotations

from typing import Any

from rlhf_dist.runs.checkpoints import Checkpoint
from rlhf_dist.runs.inputs import check_same_inputs
from rlhf_dist.runs.lineage import check_same_run
from rlhf_dist.runs.progress import Reporter
from rlhf_dist.runs.recorder import Recorder

OVER = "the run is over already; a new one needs another run.name"


def resumable(config: Any, recorder: Recorder, reporter: Reporter) -> Checkpoint | None:
    """The newest whole checkpoint of the run folder; None where there is none, and the run begins.

    Raises:
        UserError: the settings, the data or a model are those of another run; there are checkpoints, and none is whole.
    """
    checkpoint = recorder.newest_checkpoint(reporter.message)
    if checkpoint is not None:
        for change in check_same_run(checkpoint.folder, config):
            reporter.message(f"going on with another setting: {change}")
        for change in check_same_inputs(checkpoint.folder, config):
            reporter.message(f"going on with another reward function: {change}")
    return checkpoint
