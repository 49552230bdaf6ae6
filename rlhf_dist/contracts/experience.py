"""The carriers: token sequences, and what becomes of them on their way through a PPO step.

Names end in their shape: B sequences, P prompt positions (left-padded), T response positions (right-padded).
A padded slot may hold anything; masks say what counts.

Example, two samples with P = 3 and T = 2::

    prompt_tokens_BP   [[0, 5, 6], [7, 8, 9]]      prompt_mask_BP   [[0, 1, 1], [1, 1, 1]]
    response_tokens_BT [[4, 2], [2, 0]]            response_mask_BT [[1, 1], [1, 0]]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, TypeVar

import torch
from torch import Tensor

S = TypeVar("S", bound="SequenceBatch")


class StopReason(IntEnum):
    """Why a completion ended."""

    STOP_TOKEN = 0
    STOP_STRING = 1
    LENGTH = 2


@dataclass(frozen=True)
class SequenceBatch:
    """Prompts and responses as tokens: all that a forward pass needs.

    prompt_tokens_BP int64, prompt_mask_BP bool, response_tokens_BT int64;
    response_mask_BT bool: tokens the policy chose, up to and including the stop token;
    response_attention_BT bool: tokens that exist (a superset: tool and environment tokens are attended, not trained on).
    """

    prompt_tokens_BP: Tensor
    prompt_mask_BP: Tensor
    response_tokens_BT: Tensor
    response_mask_BT: Tensor
    response_attention_BT: Tensor

    def __len__(self) -> int:
        return int(self.prompt_tokens_BP.shape[0])

    @property
    def prompt_lengths_B(self) -> Tensor:
        """Prompt tokens, int64 [B]."""
        return self.prompt_mask_BP.sum(1)

    @property
    def response_lengths_B(self) -> Tensor:
        """Response positions that exist, int64 [B]."""
        return self.response_attention_BT.sum(1)

    @property
    def valid_tokens_B(self) -> Tensor:
        """Tokens the policy chose, int64 [B]: the weights of every token mean."""
        return self.response_mask_BT.sum(1)

    def replace(self: S, **changes: Any) -> S:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def select(self: S, rows: Sequence[int] | Tensor) -> S:
        """The given rows in the given order, with the padding that they still need."""
        index = torch.as_tensor(rows, dtype=torch.long)
        changes = {f.name: _take(getattr(self, f.name), index) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **changes)._trimmed()

    def to(self: S, device: torch.device | str) -> S:
        """A copy with all tensors on a device."""
        return dataclasses.replace(self, **{f.name: _move(getattr(self, f.name), device) for f in dataclasses.fields(self)})

    @classmethod
    def concat(cls: type[S], batches: Sequence[S]) -> S:
        """All rows of several batches, padded to the longest. An optional field must be filled in all or in none.

        Raises:
            ValueError: no batches, or a field filled only in some.
        """
        if not batches:
            raise ValueError("concat needs at least one batch")
        width = {"BP": max(b.prompt_tokens_BP.shape[1] for b in batches), "BT": max(b.response_tokens_BT.shape[1] for b in batches)}
        rows = [len(b) for b in batches]
        return cls(**{f.name: _join(f.name, [getattr(b, f.name) for b in batches], width, rows) for f in dataclasses.fields(cls)})

    def _trimmed(self: S) -> S:
        prompt = int(self.prompt_lengths_B.max()) if len(self) else 0
        response = int(_last_true(self.response_attention_BT).max()) if len(self) else 0
        changes: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor) and f.name.endswith("_BP"):
                changes[f.name] = value[:, value.shape[1] - prompt :]
            elif isinstance(value, Tensor) and f.name.endswith("_BT"):
                changes[f.name] = value[:, :response]
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class ExperienceBatch(SequenceBatch):
    """Rollouts; later stages fill the fields that start as None.

    prompt_id_B int64 stable hash of file and row; sample_index_B int64; policy_version_B int64 (law 8); stop_reason_B int64 `StopReason`;
    rollout_logprobs_BT float32, as the sampler saw them, in nats;
    prompts, completions: text, stop token and special tokens removed; columns: the other columns of the data row, each of length B.

    old_logprobs_BT, ref_logprobs_BT float32; values_BT float32, bootstrap_value_B float32 (value after the last token);
    score_B float32, the mixed sequence reward; advantages_BT, returns_BT float32 (advantages not yet whitened).
    """

    prompt_id_B: Tensor
    sample_index_B: Tensor
    policy_version_B: Tensor
    stop_reason_B: Tensor
    rollout_logprobs_BT: Tensor
    prompts: tuple[str, ...]
    completions: tuple[str, ...]
    columns: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    old_logprobs_BT: Tensor | None = None
    ref_logprobs_BT: Tensor | None = None
    values_BT: Tensor | None = None
    bootstrap_value_B: Tensor | None = None
    score_B: Tensor | None = None
    advantages_BT: Tensor | None = None
    returns_BT: Tensor | None = None


@dataclass(frozen=True)
class Piece:
    """What one rank computed for some rows of a shard: tensors named like the `ExperienceBatch` fields they will fill."""

    rows: tuple[int, ...]
    tensors: dict[str, Tensor]


def merge_pieces(batch: ExperienceBatch, pieces: Sequence[Piece]) -> ExperienceBatch:
    """Fills fields of a shard from the pieces of all ranks.

    Raises:
        ValueError: a row that no piece covers, for a field that some piece has.
    """
    filled: dict[str, Tensor] = {}
    covered: dict[str, set[int]] = {}
    for piece in pieces:
        for name, tensor in piece.tensors.items():
            shape = (len(batch),) + ((batch.response_tokens_BT.shape[1],) if name.endswith("_BT") else ())
            target = filled.setdefault(name, torch.zeros(shape, dtype=tensor.dtype))
            if piece.rows:
                _write(target, list(piece.rows), tensor)
            covered.setdefault(name, set()).update(piece.rows)
    for name, rows in covered.items():
        if len(rows) != len(batch):
            raise ValueError(f"{name}: {len(batch) - len(rows)} of {len(batch)} rows were computed by no rank")
    return batch.replace(**filled)


def _write(target: Tensor, rows: list[int], tensor: Tensor) -> None:
    if target.dim() == 1:
        target[rows] = tensor
    else:
        target[rows, : tensor.shape[1]] = tensor


def _last_true(mask_BT: Tensor) -> Tensor:
    """Index after the last True of each row; 0 where there is none."""
    positions = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    return torch.where(mask_BT, positions, 0).amax(1) if mask_BT.shape[1] else torch.zeros(mask_BT.shape[0], dtype=torch.long)


def _take(value: Any, index: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[index]
    if isinstance(value, dict):
        return {key: _take(column, index) for key, column in value.items()}
    return tuple(value[i] for i in index.tolist()) if isinstance(value, tuple) else value


def _move(value: Any, device: torch.device | str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _join(name: str, values: list[Any], width: dict[str, int], rows: list[int]) -> Any:
    missing = [value is None for value in values]
    if all(missing):
        return None
    if any(missing):
        raise ValueError(f"{name} is filled in some batches only")
    if isinstance(values[0], dict):
        return {key: tuple(x for value, n in zip(values, rows, strict=True) for x in value.get(key, (None,) * n)) for key in _keys(values)}
    if isinstance(values[0], tuple):
        return tuple(x for value in values for x in value)
    return torch.cat([_pad(value, name, width) for value in values])


def _keys(values: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for value in values for key in value))


def _pad(value: Tensor, name: str, width: dict[str, int]) -> Tensor:
    side = name.rsplit("_", 1)[-1]
    if side not in width:
        return value
    missing = width[side] - value.shape[1]
    return torch.nn.functional.pad(value, (missing, 0) if side == "BP" else (0, missing))
