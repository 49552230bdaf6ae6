"""Capsules: a skipped optimizer step in a folder, with all that it takes to see it again.

capsule.json           what happened, what each rank was asked and saw, the hash of every file; written last
config.yaml            of the run
shard_0000.*           of PPO, the rows of rank 0, prepared as they were trained on (`runs.rollout_state`), and so on
rows_0000.jsonl        of the other stages, the same (`runs.capsule_rows`)
model/                 the weights before the step, a Hugging Face folder
trained.safetensors    or, of adapters, the trained weights alone, under the model's own names
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.contracts.roles import Fault, RolloutInfo
from rlhf_dist.runs.atomic import write_text
from rlhf_dist.runs.capsule_rows import NumberedRow, read_rows, write_rows, written
from rlhf_dist.runs.checkpoints import hash_of, recorded_files
from rlhf_dist.runs.rollout_state import read_shard, write_shard
from rlhf_dist.runs.summary import versions

MANIFEST, CONFIG, MODEL, TRAINED = "capsule.json", "config.yaml", "model", "trained.safetensors"
FORMAT = 2
_FIX = "give a capsule as the run left it (run.output_dir/run.name/capsules/…)"


@dataclass(frozen=True)
class Part:
    """One rank's part of the step.

    microbatches: places of rows among those that it wrote, which are all places in their order. losses: of each microbatch, summed as the
    objective does, before the denominator.

    Raises:
        ValueError: other places, or another number of losses.
    """

    microbatches: tuple[tuple[int, ...], ...]
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.microbatches) != len(self.losses):
            raise ValueError(f"{len(self.microbatches)} microbatches, {len(self.losses)} losses")
        places = [place for rows in self.microbatches for place in rows]
        if places != list(range(len(places))):
            raise ValueError(f"the rows of the microbatches stand at {places}")


@dataclass(frozen=True)
class Facts:
    """What all ranks know of the step.

    stage: of the run (`config.stages`). role: `policy`, `value`, or the `model` of the other stages. fault: what was not finite, `loss` or
    `gradient`.

    Raises:
        ValueError: a denominator of 0.
    """

    stage: str
    role: str
    fault: Fault
    denominator: float
    grad_norm: float
    lr: float

    def __post_init__(self) -> None:
        if not self.denominator:
            raise ValueError("the denominator is 0")


@dataclass(frozen=True)
class Capsule:
    """A whole capsule. parts: by rank."""

    folder: Path
    facts: Facts
    parts: tuple[Part, ...]

    @property
    def loss(self) -> float:
        """Of the step, as it was: Σ over ranks and microbatches / denominator."""
        return total([loss for part in self.parts for loss in part.losses]) / self.facts.denominator

    def experience(self, rank: int) -> ExperienceBatch:
        """The rows of a rank, of PPO.

        Raises:
            UserError: they are missing or damaged.
        """
        return read_shard(self.folder, rank)[0]

    def rows(self, rank: int) -> tuple[NumberedRow, ...]:
        """The rows of a rank, of another stage.

        Raises:
            UserError: they are missing or damaged.
        """
        return read_rows(self.folder, rank)


def write_part(folder: Path, rank: int, part: Part, rows: ExperienceBatch | Sequence[NumberedRow]) -> None:
    """Writes what a rank knows; other columns of rollouts are left out.

    Raises:
        OSError: the disk is full, or the like.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, ExperienceBatch) and len(rows):
        write_shard(folder, rank, rows.replace(columns={}), _info(rows))
    elif not isinstance(rows, ExperienceBatch) and rows:
        write_rows(folder, rank, rows)
    _part_file(folder, rank).write_text(json.dumps(written(vars(part))), encoding="utf-8")


def seal(folder: Path, facts: Facts, world_size: int, config: str) -> None:
    """Makes the folder a capsule, once every rank has written its part.

    Raises:
        OSError: the disk is full, or a part cannot be seen from here.
    """
    (folder / CONFIG).write_text(config, encoding="utf-8")
    parts = [json.loads(_part_file(folder, rank).read_text(encoding="utf-8")) for rank in range(world_size)]
    for rank in range(world_size):
        _part_file(folder, rank).unlink()
    files = {file.name: [file.bytes, file.sha256] for file in recorded_files(folder)}
    values = {"format": FORMAT, "facts": written(vars(facts)), "parts": parts, "files": files, "versions": versions()}
    write_text(folder / MANIFEST, json.dumps(values, indent=2, allow_nan=False) + "\n")


def read_capsule(folder: Path) -> Capsule:
    """A capsule, every file of it held against its hash.

    Raises:
        UserError: there is none, or a file of it is missing or was changed (named).
    """
    try:
        values: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            fix = "use the version that wrote it"
            raise UserError(f"a capsule of format {values['format']!r}; this version reads {FORMAT}", where=str(folder), fix=fix)
        facts = TypeAdapter(Facts).validate_python(values["facts"])
        parts = TypeAdapter(tuple[Part, ...]).validate_python(values["parts"])
        files = TypeAdapter(dict[str, tuple[int, str]]).validate_python(values["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        what = f"{MANIFEST} cannot be read: {type(error).__name__}" if (folder / MANIFEST).exists() else f"there is no {MANIFEST}"
        raise UserError(what, where=str(folder), fix=_FIX) from None
    for name, (size, sha256) in files.items():
        _check(folder, name, size, sha256)
    return Capsule(folder, facts, parts)


def total(losses: Sequence[float]) -> float:
    """Their sum, exact; where one is not finite, neither is the sum."""
    try:
        return math.fsum(losses) if all(math.isfinite(loss) for loss in losses) else sum(losses)
    except OverflowError:  # finite ones whose sum is not
        return sum(losses)


def _check(folder: Path, name: str, size: int, sha256: str) -> None:
    path = folder / name
    if not path.is_file():
        raise UserError(f"the file {name} of the capsule is missing", where=str(folder), fix=_FIX)
    if path.stat().st_size != size or hash_of(path) != sha256:
        raise UserError(f"the file {name} of the capsule was changed after it was written", where=str(folder), fix=_FIX)


def _info(rows: ExperienceBatch) -> RolloutInfo:
    def numbers(tensor: Any) -> tuple[int, ...]:
        return tuple(tensor.tolist())

    ids, lengths = (numbers(rows.prompt_id_B), numbers(rows.sample_index_B)), (numbers(rows.prompt_lengths_B), numbers(rows.valid_tokens_B))
    return RolloutInfo(*ids, *lengths, numbers(rows.stop_reason_B), numbers(rows.policy_version_B), 0.0)


def _part_file(folder: Path, rank: int) -> Path:
    return folder / f"part_{rank:04d}.json"
