"""From which checkpoint a run may go on."""

from __future__ import annotations

from typing import Any

from rlhf_dist.config.errors import UserError
from rlhf_dist.runs.checkpoints import Checkpoint
from rlhf_dist.runs.lineage import check_same_run
from rlhf_dist.runs.progress import Reporter
from rlhf_dist.runs.recorder import Recorder


def resumable(config: Any, recorder: Recorder, reporter: Reporter) -> Checkpoint | None:
    """The newest whole checkpoint of the run folder; None where there is none, and the run begins.

    Raises:
        UserError: the run is over, or the settings are those of another run.
    """
    folder = recorder.folder
    if folder is not None and folder.summary.is_file():
        fix = "start a new one (run.name=…), or look at what came out of it (`rlhf-dist report`, summary.json)"
        raise UserError("the run is over already", where=str(folder.root), fix=fix)
    checkpoint = recorder.newest_checkpoint(reporter.message)
    if checkpoint is not None:
        for change in check_same_run(checkpoint.folder, config):
            reporter.message(f"going on with another setting: {change}")
    return checkpoint
