"""Shards of rollouts as files that give them back bit for bit: safetensors for what is tensors, JSON for text and numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.contracts.roles import RolloutInfo
from rlhf_dist.contracts.tally import Tally


def write_shard(folder: Path, number: int, batch: ExperienceBatch, info: RolloutInfo) -> None:
    """Writes a shard as `shard_<number>.safetensors` and `shard_<number>.json`.

    Raises:
        UserError: a data column that JSON would not give back as it was (named).
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    for name, column in batch.columns.items():
        _check_column(name, column)
    save_file({name: value.contiguous() for name, value in values.items() if isinstance(value, Tensor)}, _tensors(folder, number))
    text = {"prompts": batch.prompts, "completions": batch.completions, "columns": batch.columns, "info": dataclasses.asdict(info)}
    _text(folder, number).write_text(json.dumps(text), encoding="utf-8")


def read_shard(folder: Path, number: int) -> tuple[ExperienceBatch, RolloutInfo]:
    """What `write_shard` wrote.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        text = json.loads(_text(folder, number).read_text(encoding="utf-8"))
        tensors = load_file(_tensors(folder, number))
        columns = {name: tuple(column) for name, column in text["columns"].items()}
        batch = ExperienceBatch(**tensors, prompts=tuple(text["prompts"]), completions=tuple(text["completions"]), columns=columns)
        info: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in text["info"].items()}
        info["tally"] = Tally(**info["tally"])
        return batch, RolloutInfo(**info)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        what = f"shard {number} of the rollouts cannot be read: {type(error).__name__}"
        raise UserError(what, where=str(folder), fix="use another checkpoint") from None


def _check_column(name: str, column: tuple[Any, ...]) -> None:
    try:
        kept = json.loads(json.dumps(column)) == list(column)
    except (TypeError, ValueError):
        kept = False
    if not kept:
        fix = "make it text or numbers, or set rollout.max_staleness=0, where no rollouts need to be kept"
        raise UserError(f"column {name!r} holds values that cannot be saved with the rollouts", where="checkpoint", fix=fix)


def _tensors(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:04d}.safetensors"


def _text(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:04d}.json"
