"""Shards of rollouts as files that give them back bit for bit: safetensors for what is tensors, JSON for text and numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_dist.config.errors import UserError, writing
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.contracts.roles import RolloutInfo


def write_shard(folder: Path, number: int, batch: ExperienceBatch, info: RolloutInfo) -> None:
    """Writes a shard as `shard_<number>.safetensors` and `shard_<number>.json`.

    Raises:
        UserError: a data column that JSON would not give back as it was (named), text that UTF-8 cannot hold; the disk is full, or may not
            be written to.
    """
    for name, column in batch.columns.items():
        check_column(name, column)
    if not _comes_back((*batch.prompts, *batch.completions)):
        fix = "write the data anew as UTF-8, without half surrogate pairs"
        raise UserError("a prompt or completion cannot be saved with the rollouts", where="checkpoint", fix=fix)
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    tensors = {
        name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in values.items() if isinstance(value, Tensor)
    }
    text = {"prompts": batch.prompts, "completions": batch.completions, "columns": batch.columns, "info": dataclasses.asdict(info)}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, _tensors(folder, number))  # of copies: it refuses tensors that share memory, as two masks may
        except SafetensorError as error:  # the file system's errors, in words
            raise OSError(str(error)) from error
        _text(folder, number).write_text(json.dumps(text), encoding="utf-8")


def read_shard(folder: Path, number: int) -> tuple[ExperienceBatch, RolloutInfo]:
    """What `write_shard` wrote.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        text = _Text.model_validate_json(_text(folder, number).read_bytes())
        tensors = load_file(_tensors(folder, number))
        batch = ExperienceBatch(**tensors, prompts=text.prompts, completions=text.completions, columns=text.columns)
        _check_whole(batch, text.info)
        return batch, text.info
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        what = f"shard {number} of the rollouts cannot be read: {type(error).__name__}"
        raise UserError(what, where=str(folder), fix="use another checkpoint") from None


def check_column(name: str, column: tuple[Any, ...], where: str = "checkpoint") -> None:
    """Whether a data column can wait in a checkpoint with the rollouts of its prompts: what JSON holds can, NaN and infinity included.

    Args:
        name: of the column. column: values of any number of rows. where: they are, for the message.

    Raises:
        UserError: it would not come back as it is.
    """
    if not _comes_back(column):
        fix = "make it text or numbers, or set rollout.max_staleness=0, where no rollouts need to be kept"
        raise UserError(f"column {name!r} holds values that cannot be saved with the rollouts", where=where, fix=fix)


class _Text(BaseModel):
    """What `write_shard` writes as JSON."""

    model_config = ConfigDict(strict=True, extra="forbid")
    prompts: tuple[str, ...]
    completions: tuple[str, ...]
    columns: dict[str, tuple[Any, ...]]
    info: RolloutInfo


def _check_whole(batch: ExperienceBatch, info: RolloutInfo) -> None:
    """Every field has one entry a sample, in its own shape and type.

    Raises:
        ValueError: one has not.
    """
    tensors = {f.name: value for f in dataclasses.fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)}
    rows, wide = len(batch.prompts), {"BP": batch.prompt_mask_BP.shape[1:], "BT": batch.response_mask_BT.shape[1:]}
    for name, tensor in tensors.items():
        letters = name.rpartition("_")[2]
        if tensor.shape != (rows, *wide.get(letters, ())) or len(tensor.shape) != len(letters) or tensor.dtype != _dtype(name):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, {tensor.dtype}")
    lists = [batch.completions, *batch.columns.values(), info.prompt_ids, info.sample_indices, info.prompt_lengths]
    lists += [info.response_lengths, info.stop_reasons, info.versions]
    if {len(each) for each in lists} != {rows}:
        raise ValueError("the lists differ in length")


def _dtype(name: str) -> torch.dtype:
    if "mask" in name or "attention" in name:
        return torch.bool
    return torch.float32 if name.startswith(_NUMBERS) else torch.int64


_NUMBERS = ("rollout_logprobs", "old_logprobs", "ref_logprobs", "values", "bootstrap", "score", "advantages", "returns")


def _comes_back(values: tuple[Any, ...]) -> bool:
    """Compared as they are written, for NaN is equal to nothing; half a surrogate pair cannot be encoded, and is refused on reading."""
    try:
        written = json.dumps(values, ensure_ascii=False).encode()
        return repr(json.loads(written)) == repr(list(values))
    except (TypeError, ValueError, RecursionError):
        return False


def _tensors(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:04d}.safetensors"


def _text(folder: Path, number: int) -> Path:
    return folder / f"shard_{number:04d}.json"
