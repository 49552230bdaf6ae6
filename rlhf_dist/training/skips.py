"""Optimizer steps of a supervised stage that are skipped, because loss or gradient is not finite: how many in a row, how many capsules."""

from __future__ import annotations

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.supervised import TrainingSection
from rlhf_dist.contracts.roles import NOT_WRITTEN, UpdateInfo


class Skips:
    """Counts.

    Args:
        section: how many may be skipped in a row, and written down in all.
        row: skipped in a row so far. capsules: written down so far. Both are saved with the run.
    """

    def __init__(self, section: TrainingSection, row: int = 0, capsules: int = 0) -> None:
        self._most, self._capsules = section.max_skipped, section.capsules
        self.row, self.capsules = row, capsules
        self._newest = ""

    @property
    def left(self) -> int:
        """How many may still be written down."""
        return max(self._capsules - self.capsules, 0)

    def note(self, step: int, info: UpdateInfo) -> list[str]:
        """Takes in one more step; returns what there is to say of it. An overflow of fp16's loss scale neither counts nor ends a row."""
        if not info.fault:
            self.row = self.row if info.step.skipped else 0
            return []
        self.row += 1
        said = [f"step {step} skipped: the {info.fault} was not finite"]
        if info.capsule:
            self.capsules += 1
            self._newest = self._newest if info.capsule.startswith(NOT_WRITTEN) else info.capsule
            said.append(f"capsule: {info.capsule}")
        return said

    def spent(self, step: int) -> UserError | None:
        """Why the run must stop after this step, if it must; the row then begins anew, for a run that is resumed."""
        if self.row < self._most:
            return None
        what = f"{self.row} optimizer steps in a row were skipped: their loss or gradient was not finite"
        seen = f"`rlhf-dist replay {self._newest}` shows which rows" if self._newest else "the run's folder capsules/ may show which rows"
        fix = (
            f"{seen}; the state is saved: raise training.max_skipped and go on with run.resume=auto, or mend the rows, or lower the "
            "learning rate, and begin anew"
        )
        self.row = 0
        return UserError(what, where=f"step {step} (training.max_skipped {self._most})", fix=fix)
