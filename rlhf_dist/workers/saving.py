"""What all workers with a trained engine share: saving it, and taking up what was saved (contracts.roles.SavedRole)."""

from __future__ import annotations

from pathlib import Path

from rlhf_dist.contracts.engine import SavedFile
from rlhf_dist.engines.deepspeed import DeepSpeedEngine


class SavedWorker:
    """A worker whose `_engine` is trained."""

    _engine: DeepSpeedEngine

    def begin_save(self, folder: str) -> None:
        """Copies this rank's weights and optimiser state, and begins to write the copy."""
        self._engine.begin_save(Path(folder))

    def saved(self, wait: bool) -> tuple[SavedFile, ...] | None:
        """What was written since `begin_save`; None: not all of it yet.

        Raises:
            UserError: it could not be written.
        """
        return self._engine.saved(wait)

    def load_state(self, folder: str) -> None:
        """Takes up saved weights and optimiser state.

        Raises:
            UserError: they are of another model, or damaged.
        """
        self._engine.load(Path(folder))
