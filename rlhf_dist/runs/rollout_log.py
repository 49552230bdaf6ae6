"""Rollouts as Parquet: one row a sample, readable by any tool, one stable schema."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import ExperienceBatch, StopReason
from rlhf_dist.runs.atomic import replacing

REWARD = "reward/"
"""Prefix of the columns with raw rewards; null where the reward abstained."""

CORE = pa.schema(
    [
        ("prompt_id", pa.int64()),
        ("sample_index", pa.int64()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("score", pa.float64()),
        ("kl", pa.float64()),
        ("rollout_gap", pa.float64()),
        ("prompt_tokens", pa.int64()),
        ("response_tokens", pa.int64()),
        ("stop_reason", pa.string()),
        ("policy_version", pa.int64()),
        ("kept", pa.bool_()),
    ]
)
"""score: null where no reward gave one. kl: Σ k1 of the sequence in nats, null without reference. rollout_gap: mean |old − rollout|
log-prob of a token, null without old log-probs. prompt_tokens, response_tokens: lengths. stop_reason: stop_token, stop_string or length."""


def write_rollouts(path: Path, batch: ExperienceBatch, details: Mapping[str, Sequence[Any]]) -> int:
    """Writes a step's samples atomically; returns the number of rows.

    Args:
        path: the Parquet file.
        batch: rollouts; old and reference log-probs and scores may be filled or not. What stands in masked slots does not matter (law 1).
        details: lists of one value a row: `reward/<name>` (raw, None = abstained), `kept` (default: all), `score` (instead of the batch's),
            and any others.

    Raises:
        ValueError: a list of another length, a name that the batch itself fills, a non-finite reward, a non-finite score in a kept row.
    """
    for name, values in details.items():
        if len(values) != len(batch):
            raise ValueError(f"{name} has {len(values)} values for {len(batch)} samples")
        if name in CORE.names and name not in ("score", "kept"):
            raise ValueError(f"{name} comes from the batch, not from details")
    columns = [pa.array(values, type=kind.type) for values, kind in zip(_core(batch, details), CORE, strict=True)]
    fields = list(CORE)
    for name, values in details.items():
        if name not in CORE.names:
            column = _detail(name, values)
            columns.append(column)
            fields.append(pa.field(name, column.type))
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_arrays(columns, schema=pa.schema(fields)), temporary, compression="zstd")
    return len(batch)


def read_rollouts(path: Path) -> pa.Table:
    """A table that `write_rollouts` wrote.

    Raises:
        UserError: no such file, not Parquet, or without the columns of a rollout file.
    """
    try:
        with pq.ParquetFile(path) as file:
            table = file.read()
        table.validate(full=True)
    except (OSError, ValueError, LookupError, MemoryError, pa.ArrowException) as error:
        raise UserError(
            f"cannot read the rollouts: {error}", where=str(path), fix="pass a Parquet file from rollouts/ or evaluation/ of a run"
        ) from None
    missing = [name for name in CORE.names if name not in table.column_names]
    if missing:
        raise UserError(
            f"not a rollout file: it lacks {', '.join(missing)}",
            where=str(path),
            fix="pass a Parquet file from rollouts/ or evaluation/ of a run",
        )
    return table


def reward_names(table: pa.Table) -> list[str]:
    """Names of the raw rewards in a rollout table."""
    return [name.removeprefix(REWARD) for name in table.column_names if name.startswith(REWARD)]


def _core(batch: ExperienceBatch, details: Mapping[str, Sequence[Any]]) -> list[list[Any]]:
    """Columns in the order of `CORE`."""
    kept = [bool(keep) for keep in details["kept"]] if "kept" in details else [True] * len(batch)
    return [
        batch.prompt_id_B.tolist(),
        batch.sample_index_B.tolist(),
        list(batch.prompts),
        list(batch.completions),
        _scores(details.get("score", batch.score_B), kept),
        _kl(batch),
        _rollout_gap(batch),
        batch.prompt_lengths_B.tolist(),
        batch.response_lengths_B.tolist(),
        [StopReason(reason).name.lower() for reason in batch.stop_reason_B.tolist()],
        batch.policy_version_B.tolist(),
        kept,
    ]


def _scores(values: Tensor | Sequence[Any] | None, kept: list[bool]) -> list[float | None]:
    """A dropped sample may have no score: null then, never a number that was made up."""
    if values is None:
        return [None] * len(kept)
    scores: list[float | None] = []
    for row, (value, keep) in enumerate(zip(values, kept, strict=True)):
        number = None if value is None else float(value)
        if number is not None and not math.isfinite(number):
            if keep:
                raise ValueError(f"row {row} is kept, but its score is {number}")
            number = None
        scores.append(number)
    return scores


def _kl(batch: ExperienceBatch) -> list[float | None]:
    """Σ_t k1 = Σ_t (log π_old − log π_ref) over valid tokens (NUMERICS section 1)."""
    if batch.old_logprobs_BT is None or batch.ref_logprobs_BT is None:
        return [None] * len(batch)
    return _masked(batch.old_logprobs_BT, batch.ref_logprobs_BT, batch).sum(1).tolist()


def _rollout_gap(batch: ExperienceBatch) -> list[float | None]:
    """How far the sampler's log-probs are from the training forward's; null for a sample without a valid token."""
    if batch.old_logprobs_BT is None:
        return [None] * len(batch)
    sums = _masked(batch.old_logprobs_BT, batch.rollout_logprobs_BT, batch).abs().sum(1).tolist()
    return [total / count if count else None for total, count in zip(sums, batch.valid_tokens_B.tolist(), strict=True)]


def _masked(left_BT: Tensor, right_BT: Tensor, batch: ExperienceBatch) -> Tensor:
    return torch.where(batch.response_mask_BT, left_BT.double() - right_BT.double(), 0.0)


def _detail(name: str, values: Sequence[Any]) -> pa.Array:
    plain = values.tolist() if isinstance(values, Tensor) else list(values)
    if not name.startswith(REWARD):
        return pa.array(plain)
    for row, value in enumerate(plain):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} is {value} in row {row}: a failed reward is not a number")
    return pa.array(plain, type=pa.float64())
