"""A checkpoint on its way: the workers copy what they hold and write the copy while training goes on; once all is on disk, it is committed.

One is on its way at a time, so memory holds one copy at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_dist.config.operation import CheckpointSection
from rlhf_dist.contracts.engine import SavedFile
from rlhf_dist.contracts.group import WorkerGroup
from rlhf_dist.contracts.roles import SavedRole
from rlhf_dist.runs.checkpoints import Checkpoint
from rlhf_dist.runs.recorder import Recorder


@dataclass(frozen=True)
class _OnItsWay:
    step: int
    state: dict[str, Any]
    written: tuple[SavedFile, ...]


class Saver:
    """Saves the groups that learn, and gives them back what was saved.

    Args:
        section: how many checkpoints are kept, and whether training waits for the files.
        groups: workers of `SavedRole`.
        recorder: owns the folder.
        turn: called before a group is asked to copy or to load, where groups take turns on a device.
    """

    def __init__(
        self,
        section: CheckpointSection,
        groups: Sequence[WorkerGroup],
        recorder: Recorder,
        turn: Callable[[WorkerGroup], None] = lambda group: None,
    ) -> None:
        self._keep, self._waits = section.keep, not section.asynchronous
        self._groups, self._recorder, self._turn = groups, recorder, turn
        self._on_its_way: _OnItsWay | None = None
        self._stall = 0.0
        self._committed: int | None = None

    def begin(self, step: int, state: dict[str, Any], besides: Callable[[str], Sequence[SavedFile]] = lambda folder: ()) -> None:
        """Takes a checkpoint after `step` steps; returns once everything is copied, or, where training waits, committed. Not twice.

        Args:
            step: steps done.
            state: JSON-able, kept as it is.
            besides: writes what else belongs into the folder, and says what it wrote.

        Raises:
            UserError: a disk is full, or the files cannot be seen from here.
        """
        began = time.perf_counter()
        self._commit(wait=True)
        if self._committed == step:
            return
        folder = self._recorder.begin_checkpoint(step)
        if not folder:  # nothing of this run is kept
            return
        for group in self._groups:
            self._turn(group)
            group.collect(group.submit(SavedRole.begin_save, [(f"{folder}/{group.name}",)] * group.world_size))
        self._on_its_way = _OnItsWay(step, state, tuple(besides(folder)))
        if self._waits:
            self._commit(wait=True)
        self._stall += time.perf_counter() - began

    def poll(self) -> None:
        """Commits what is on its way once it is all there; does not wait."""
        self._commit(wait=False)

    def finish(self) -> None:
        """Waits for what is on its way, and commits it."""
        self._commit(wait=True)

    def abandon(self) -> None:
        """What is on its way will not come: its writers are gone, and what they held. What was committed may be looked for again."""
        self._on_its_way = self._committed = None
        self._recorder.clear_partial()

    def load(self, checkpoint: Checkpoint) -> None:
        """Gives the groups what the checkpoint holds.

        Raises:
            UserError: the files are of other models, or damaged.
        """
        asked = []
        for group in self._groups:
            self._turn(group)
            folder = f"{checkpoint.folder}/{group.name}"
            asked.append((group, group.submit(SavedRole.load_state, [(folder,)] * group.world_size)))
        for group, handles in asked:
            group.collect(handles)
        self._committed = checkpoint.step

    def metrics(self) -> dict[str, float]:
        """`perf/checkpoint_stall_seconds`: how long the run stood still for checkpoints since the last look; empty where there was none."""
        stall, self._stall = self._stall, 0.0
        return {"perf/checkpoint_stall_seconds": stall} if stall else {}

    def _commit(self, *, wait: bool) -> None:
        if self._on_its_way is None:
            return
        answers = [(group.name, group.collect(group.submit(SavedRole.saved, [(wait,)] * group.world_size))) for group in self._groups]
        if any(files is None for _, saved in answers for files in saved):
            return
        written = [
            SavedFile(f"{name}/{file.name}", file.bytes, file.sha256) for name, saved in answers for files in saved for file in files
        ]
        done, self._on_its_way = self._on_its_way, None
        self._recorder.commit_checkpoint(done.step, done.state, [*written, *done.written], self._keep)
        self._committed = done.step
