"""Checkpoints as folders that exist whole or not at all, with a manifest, and how many of them are kept.

A checkpoint grows in a hidden folder and is published by renaming it, so a run killed half-way leaves nothing that counts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_dist.config.errors import UserError
from rlhf_dist.runs.atomic import write_text

MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint.

    step: PPO steps done. time: seconds since the epoch. files: size in bytes by path inside the folder. state: JSON-able.
    """

    folder: Path
    step: int
    time: float
    files: dict[str, int]
    state: dict[str, Any]

    def verify(self) -> None:
        """Holds the folder against its manifest.

        Raises:
            UserError: a file is missing or has another size.
        """
        for name, size in self.files.items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes, not {size}"
                raise UserError(f"checkpoint file {name} {state}", where=str(self.folder), fix="use another checkpoint")


class CheckpointStore:
    """The `checkpoints/` folder of a run. One process owns it; others may write models into it between `begin` and `publish`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def begin(self, step: int) -> Path:
        """An empty folder to write the checkpoint of `step` into. Leftovers of killed runs are removed."""
        for leftover in self._root.glob(".step_*"):
            shutil.rmtree(leftover)
        folder = self._partial(step)
        folder.mkdir(parents=True)
        return folder

    def publish(self, step: int, state: dict[str, Any]) -> Checkpoint:
        """Writes the manifest over what stands in the folder of `begin`, and renames it. Replaces an older checkpoint of the same step.

        Raises:
            FileNotFoundError: `begin` was not called for this step.
            ValueError: nothing was written into the folder, or the state is not JSON-able.
        """
        partial, final = self._partial(step), self._final(step)
        if not partial.is_dir():
            raise FileNotFoundError(f"no checkpoint of step {step} was begun in {self._root}")
        files = {path.relative_to(partial).as_posix(): path.stat().st_size for path in sorted(partial.rglob("*")) if path.is_file()}
        if not files:
            raise ValueError(f"the checkpoint of step {step} is empty")
        manifest = {"step": step, "time": time.time(), "files": files, "state": state}
        write_text(partial / MANIFEST, json.dumps(manifest, indent=2, allow_nan=False) + "\n")
        replaced = _hidden(final) if final.exists() else None
        if replaced:
            os.rename(final, replaced)
        os.rename(partial, final)
        if replaced:
            shutil.rmtree(replaced)
        return _read(final)

    def all(self) -> list[Checkpoint]:
        """Published checkpoints, oldest step first. A folder without a manifest is none.

        Raises:
            UserError: a manifest that cannot be read.
        """
        if not self._root.is_dir():
            return []
        folders = [path for path in self._root.iterdir() if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
        return sorted((_read(folder) for folder in folders), key=lambda checkpoint: checkpoint.step)

    def latest(self) -> Checkpoint | None:
        """The checkpoint of the highest step, verified; None when there is none.

        Raises:
            UserError: it does not agree with its manifest.
        """
        checkpoints = self.all()
        if not checkpoints:
            return None
        checkpoints[-1].verify()
        return checkpoints[-1]

    def prune(self, keep: int, protect: Collection[int] = ()) -> list[int]:
        """Removes all but the `keep` latest checkpoints and those of the steps in `protect`; returns the removed steps.

        Raises:
            ValueError: keep < 1.
        """
        if keep < 1:
            raise ValueError("keep must be at least 1")
        doomed = [checkpoint for checkpoint in self.all()[:-keep] if checkpoint.step not in protect]
        for checkpoint in doomed:
            # Renamed first: a kill in the middle must not leave a half-emptied folder that still counts.
            hidden = _hidden(checkpoint.folder)
            os.rename(checkpoint.folder, hidden)
            shutil.rmtree(hidden)
        return [checkpoint.step for checkpoint in doomed]

    def _final(self, step: int) -> Path:
        return self._root / f"step_{step:06d}"

    def _partial(self, step: int) -> Path:
        return self._root / f".step_{step:06d}.partial"


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.removed")


def _read(folder: Path) -> Checkpoint:
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Checkpoint(folder, values["step"], values["time"], values["files"], values["state"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the checkpoint's manifest cannot be read: {error!r}", where=str(path), fix="remove this checkpoint, use another"
        ) from None
