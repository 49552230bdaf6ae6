"""How a role scores a shard: each rank its rows, in length-sorted microbatches, and the answer back in row order."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.contracts.engine import Engine, Outputs
from rlhf_dist.contracts.experience import ExperienceBatch, Piece
from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.roles import PieceInfo
from rlhf_dist.data.microbatches import token_budget_cuts


def rows_of_rank(rows: int, rank: int, world_size: int) -> tuple[int, ...]:
    """Every world_size-th row: neighbours, which have similar lengths, go to different ranks."""
    return tuple(range(rank, rows, world_size))


def score_rows(
    engine: Engine, shard: ExperienceBatch, names: Mapping[str, str], budget: int, packed: bool = False, **options: Any
) -> Stored[Piece, PieceInfo]:
    """Forwards this rank's rows of a shard. Collective.

    Args:
        engine: the role's engine.
        shard: rollouts.
        names: engine output → experience field, for example {"logprobs_BT": "ref_logprobs_BT"}.
        budget: padded tokens in one microbatch.
        packed: the budget counts no padding.
        options: passed on to the module's forward.
    """
    began = time.perf_counter()
    rows = rows_of_rank(len(shard), engine.rank, engine.world_size)
    mine = shard.select(rows)
    cuts = token_budget_cuts((mine.prompt_lengths_B + mine.response_lengths_B).tolist(), budget, packed=packed)
    outputs = engine.forward([mine.select(cut) for cut in cuts], **options)
    tensors = {field: in_row_order(outputs, cuts, name, len(rows)) for name, field in names.items()}
    return Stored(Piece(rows, tensors), PieceInfo(rows, time.perf_counter() - began))


def in_row_order(outputs: Sequence[Outputs], cuts: Sequence[Sequence[int]], name: str, rows: int) -> Tensor:
    """One output of all microbatches, back in row order, padded with zeros to the longest."""
    if not outputs:
        return torch.zeros((0, 0) if name.endswith("_BT") else (0,))
    if not name.endswith("_BT"):
        return _scatter([output[name] for output in outputs], cuts, torch.zeros(rows))
    width = max(output[name].shape[1] for output in outputs)
    return _scatter([output[name] for output in outputs], cuts, torch.zeros(rows, width))


def _scatter(parts: list[Tensor], cuts: Sequence[Sequence[int]], target: Tensor) -> Tensor:
    for part, cut in zip(parts, cuts, strict=True):
        if target.dim() == 1:
            target[list(cut)] = part.float()
        else:
            target[list(cut), : part.shape[1]] = part.float()
    return target
