"""Checkpoints as folders that exist whole or not at all, with a manifest that has the hash of every file, itself included.

A checkpoint grows in a hidden folder and is committed by one rename, after everything in it has reached the disk. So a run that is killed
half-way leaves nothing that counts, and what was damaged later is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.engine import SavedFile
from rlhf_dist.runs.atomic import to_disk, write_text
from rlhf_dist.runs.summary import versions

MANIFEST = "manifest.json"
FORMAT = 2
CHUNK = 4 * 2**20
_NAME = re.compile(r"step_([0-9]{6,18})")
_REFUSED = "use another checkpoint, or let run.resume=auto take the newest whole one"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    step: steps done. time: seconds since the epoch. files: by path inside the folder. state: JSON-able. versions: of the packages.
    """

    folder: Path
    step: int
    time: float
    files: dict[str, SavedFile]
    state: dict[str, Any]
    versions: dict[str, str | None]

    def verify(self) -> None:
        """Holds every file against its size and its hash.

        Raises:
            UserError: a file is missing, has another size or other contents (named).
        """
        for name, saved in self.files.items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found is None:
                wrong = "is missing"
            elif found != saved.bytes:
                wrong = f"has {found} bytes, not {saved.bytes}"
            elif _hash_or_not(path) != saved.sha256:
                wrong = "has other contents than were written, or cannot be read"
            else:
                continue
            raise UserError(f"checkpoint file {name} {wrong}", where=str(self.folder), fix=_REFUSED)


class CheckpointStore:
    """The `checkpoints/` folder of a run. One process owns it; others may write into a folder between `begin` and `commit`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def partial(self, step: int) -> Path:
        """Where the checkpoint of a step grows."""
        return self._root / f".step_{step:06d}.partial"

    def begin(self, step: int) -> Path:
        """Makes the folder that the checkpoint of `step` grows in. What others have begun to write there stays."""
        folder = self.partial(step)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def clear(self) -> None:
        """Removes what killed runs left half-written or half-removed. A worker that is about to end may still be writing into one: it is
        moved out of the way first, and what appears in it then goes with the next `prune`."""
        for leftover in list(self._root.glob(".step_*")):
            aside = leftover if leftover.name.endswith(".aside") else leftover.with_name(f"{leftover.name}.aside")
            shutil.rmtree(aside, ignore_errors=True)
            if leftover != aside:
                os.rename(leftover, aside)
                shutil.rmtree(aside, ignore_errors=True)

    def commit(self, step: int, state: dict[str, Any], written: Iterable[SavedFile] = ()) -> Checkpoint:
        """Makes the folder of `begin` count: manifest, to disk, rename.

        Args:
            step: steps done.
            state: JSON-able.
            written: files that their writers hashed and brought to disk; others in the folder are hashed and brought there now.

        Raises:
            UserError: a written file cannot be seen from here, or has another size: the folder is not shared by all machines.
            FileNotFoundError: `begin` was not called for this step.
            ValueError: nothing was written, or the state is not JSON-able.
        """
        partial, final = self.partial(step), self._final(step)
        if not partial.is_dir():
            raise FileNotFoundError(f"no checkpoint of step {step} was begun in {self._root}")
        files = _recorded(partial, {file.name: file for file in written})
        values: dict[str, Any] = {"format": FORMAT, "step": step, "time": time.time(), "state": state, "versions": versions()}
        values["files"] = {name: [file.bytes, file.sha256] for name, file in sorted(files.items())}
        write_text(partial / MANIFEST, json.dumps(values | {"sha256": _digest(values)}, indent=2, allow_nan=False) + "\n")
        for folder in sorted({partial, *(path.parent for path in partial.rglob("*"))}):
            to_disk(folder)
        if final.exists():  # one that was refused: a whole one of the same step is never written again
            shutil.rmtree(_aside(final), ignore_errors=True)
            os.rename(final, _aside(final))
        os.rename(partial, final)
        to_disk(self._root)
        return _read(final)

    def all(self) -> list[Checkpoint]:
        """Committed checkpoints, oldest step first; their files are not looked at. One whose manifest cannot be read is left out."""
        return [checkpoint for _, checkpoint in sorted(self._steps().items()) if isinstance(checkpoint, Checkpoint)]

    def newest(self, refused: Callable[[str], None]) -> Checkpoint | None:
        """The newest whole checkpoint; None when there is none at all.

        Args:
            refused: told of every newer one that is damaged, by name and with the reason.

        Raises:
            UserError: there are some, and none can be used. To begin anew then is for a person to decide.
        """
        steps = sorted(self._steps().items(), reverse=True)
        for _, found in steps:
            try:
                if isinstance(found, UserError):
                    raise found
                found.verify()
                return found
            except UserError as error:
                refused(f"checkpoint {Path(error.where).name} is damaged and not used: {error.what}")
        if steps:
            fix = "put one back as it was, or remove them all to begin anew"
            raise UserError(f"none of the run's {len(steps)} checkpoints can be used", where=str(self._root), fix=fix)
        return None

    def prune(self, keep: int, newest: int) -> list[int]:
        """Removes all but the `keep` latest checkpoints up to that of step `newest`; returns the removed steps.

        Args:
            keep: how many stay.
            newest: the step of the checkpoint that was just committed. Later ones are what a run that went back has refused.

        Raises:
            ValueError: keep < 1.
        """
        if keep < 1:
            raise ValueError("keep must be at least 1")
        steps = self._steps()
        kept = sorted(step for step, found in steps.items() if step <= newest and isinstance(found, Checkpoint))[-keep:]
        doomed = sorted(step for step in steps if step not in kept)
        for step in doomed:
            # Renamed first: a kill in the middle must not leave a half-emptied folder that still counts.
            shutil.rmtree(_aside(self._final(step)), ignore_errors=True)
            os.rename(self._final(step), _aside(self._final(step)))
        for folder in self._root.glob(".step_*.aside"):
            shutil.rmtree(folder, ignore_errors=True)
        return doomed

    def _steps(self) -> dict[int, Checkpoint | UserError]:
        found: dict[int, Checkpoint | UserError] = {}
        for path in self._root.iterdir() if self._root.is_dir() else ():
            name = _NAME.fullmatch(path.name)
            if name and path.is_dir():
                try:
                    found[int(name[1])] = read_checkpoint(path)
                except UserError as error:
                    found[int(name[1])] = error
        return found

    def _final(self, step: int) -> Path:
        return self._root / f"step_{step:06d}"


def read_checkpoint(folder: Path) -> Checkpoint:
    """A committed checkpoint by its folder; its files are not looked at (`Checkpoint.verify`).

    Raises:
        UserError: no manifest, one that was changed, or one of another version.
    """
    return _read(folder)


def recorded_files(folder: Path) -> tuple[SavedFile, ...]:
    """All files of a folder, brought to disk and hashed."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(_durable(path.relative_to(folder).as_posix(), path) for path in paths)


def hash_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _hash_or_not(path: Path) -> str:
    try:
        return hash_of(path)
    except OSError:
        return ""


def _recorded(folder: Path, written: dict[str, SavedFile]) -> dict[str, SavedFile]:
    (folder / MANIFEST).unlink(missing_ok=True)  # of a try that did not end
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for name, file in written.items():
        size = paths[name].stat().st_size if name in paths else None
        if size != file.bytes:
            seen = "cannot be seen" if size is None else f"has {size} bytes"
            fix = "set run.output_dir to a folder that all machines of the run share"
            raise UserError(f"{name} was written with {file.bytes} bytes, but {seen} from the coordinator", where=str(folder), fix=fix)
    if not paths:
        raise ValueError(f"the checkpoint in {folder} is empty")
    return written | {name: _durable(name, path) for name, path in paths.items() if name not in written}


def _durable(name: str, path: Path) -> SavedFile:
    to_disk(path)
    return SavedFile(name, path.stat().st_size, hash_of(path))


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.aside")


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _inside(name: str) -> str:
    """A manifest names files of its own folder, nothing else on the machine."""
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name!r} is no file of the folder")
    return name


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    format: int
    step: NonNegativeInt
    time: float
    files: dict[Annotated[str, AfterValidator(_inside)], tuple[NonNegativeInt, str]]
    state: dict[str, Any]
    versions: dict[str, str | None]


def _read(folder: Path) -> Checkpoint:
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise UserError(f"its format is {values['format']!r:.60}, this version reads {FORMAT}", where=str(folder), fix=_REFUSED)
        if values.pop("sha256") != _digest(values):
            raise UserError(f"{MANIFEST} was changed after it was written", where=str(folder), fix=_REFUSED)
        found = _Manifest.model_validate_json(json.dumps(values))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{MANIFEST} cannot be read: {type(error).__name__}", where=str(folder), fix=_REFUSED) from None
    name = _NAME.fullmatch(folder.name)
    if name and int(name[1]) != found.step:
        raise UserError(f"{MANIFEST} is that of step {found.step}", where=str(folder), fix=_REFUSED)
    files = {name: SavedFile(name, size, sha256) for name, (size, sha256) in found.files.items()}
    return Checkpoint(folder, found.step, found.time, files, found.state, found.versions)
