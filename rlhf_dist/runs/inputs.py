"""What a run was made from: a fingerprint of its data, models and reward functions, so that it does not go on with others unnoticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from rlhf_dist.config.errors import UserError
from rlhf_dist.runs.checkpoints import hash_of

INPUTS = "inputs.json"
DATA, MODEL, REWARD = "data", "model", "reward"
ENDS = 2**20
"""Bytes at either end of a model's file that are read: whole files of many GB would hold up each start."""
_ADAPTER = "adapter_config.json"
_LOADED = (".safetensors", ".bin", ".json", ".txt", ".model", ".tiktoken", ".jinja", ".py")
_WRITTEN = TypeAdapter(dict[str, dict[str, str]])


def fingerprint(config: BaseModel) -> dict[str, dict[str, str]]:
    """A hash of every input of a run that is a file here, by its kind (`data`, `model`, `reward`) and path.

    Of data and of `file.py:function` the SHA-256 of the contents; of each file in a model folder its size and the SHA-256 of its first and
    last MiB. Hub names and modules are no paths and are left out, as is what cannot be read: whoever needs it says so.

    Args:
        config: of any stage, with absolute paths.
    """
    found: dict[str, dict[str, str]] = {DATA: {}, MODEL: {}, REWARD: {}}
    for kind, path in _paths(config.model_dump(mode="json")):
        for file in _model_files(path) if kind == MODEL else [path]:
            digest = _digest(file, _hash_of_ends if kind == MODEL else hash_of)
            if digest is not None:
                found[kind][str(file)] = digest
    return found


def inputs_text(config: BaseModel) -> str:
    """The fingerprint as it is kept with the run and with its checkpoints."""
    return json.dumps(fingerprint(config), indent=2) + "\n"


def check_same_inputs(folder: Path, config: BaseModel) -> list[str]:
    """Holds the inputs of a run that goes on to those it began with; returns what changed and may: reward functions.

    Args:
        folder: of the checkpoint. One that was taken before inputs were kept is not checked.
        config: of the run that goes on.

    Raises:
        UserError: data or a model changed or is gone; or what was kept cannot be read.
    """
    if not (folder / INPUTS).is_file():
        return []
    try:
        saved = _WRITTEN.validate_json((folder / INPUTS).read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{INPUTS} cannot be read: {type(error).__name__}", where=str(folder), fix="use another checkpoint") from None
    now = fingerprint(config)
    other = [said for kind in (DATA, MODEL) for said in _changes(saved.get(kind, {}), now[kind])]
    if other:
        more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        raise UserError(other[0] + more, where=str(folder), fix="put it back as it was, or start a new run (run.name=…)")
    return _changes(saved.get(REWARD, {}), now[REWARD])


def _changes(saved: dict[str, str], now: dict[str, str]) -> list[str]:
    """A file that came counts too: a model folder may be loaded from it."""
    wrong = [path for path in sorted({*saved, *now}) if saved.get(path) != now.get(path)]
    return [f"{path} is not what it was when the run began{'' if path in now else ': it is gone, or cannot be read'}" for path in wrong]


def _paths(sections: dict[str, Any]) -> Iterator[tuple[str, Path]]:
    """All that a config names and that may be a file or folder here, with its kind."""
    for section in sections.values():
        for path in (*section.get("train", ()), *section.get("eval", ())):
            yield DATA, Path(path)
        for holder in (section, *section.get("sources", ())):
            if holder.get("model"):
                yield MODEL, Path(holder["model"])
            module = holder.get("path", "").rpartition(":")[0]
            if module.endswith(".py"):
                yield REWARD, Path(module)


def _model_files(folder: Path) -> list[Path]:
    """What the libraries may load of a model folder, and of the base model that an adapter names."""
    files = _loaded(folder)
    if folder / _ADAPTER not in files:
        return files
    try:
        base = json.loads((folder / _ADAPTER).read_bytes())["base_model_name_or_path"]
        return [*files, *_loaded(Path(base).expanduser())]
    except (OSError, ValueError, LookupError, TypeError, RuntimeError):  # loading says what is wrong with it
        return files


def _loaded(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix in _LOADED and path.is_file())
    except (OSError, ValueError):
        return []


def _digest(path: Path, how: Callable[[Path], str]) -> str | None:
    try:
        return how(path) if path.is_file() else None
    except (OSError, ValueError):
        return None


def _hash_of_ends(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(ENDS))
        file.seek(max(size - ENDS, 0))
        digest.update(file.read(ENDS))
    return f"{size}:{digest.hexdigest()}"
