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
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.data.microbatches import token_budget_cuts
from rlhf_dist.data.schedule import balance
from rlhf_dist.models.flops import flops_of, forward_flops

SCORER = {"old_logprobs_BT": "policy", "ref_logprobs_BT": "reference", "values_BT": "value", "bootstrap_value_B": "value"}
"""Whose numbers fill a field."""


def rows_of_rank(rows: int, rank: int, world_size: int) -> tuple[int, ...]:
    """Every world_size-th row: neighbours, which have similar lengths, go to different ranks."""
    return tuple(range(rank, rows, world_size))


def score_rows(
    engine: Engine, shard: ExperienceBatch, names: Mapping[str, str], budget: int, packed: bool = False, **options: Any
) -> Stored[Piece, PieceInfo]:
    """Forwards this rank's rows of a shard, of which every rank has like work. Collective.

    Args:
        engine: the role's engine.
        shard: rollouts.
        names: engine output → experience field, for example {"logprobs_BT": "ref_logprobs_BT"}.
        budget: padded tokens in one microbatch.
        packed: the budget counts no padding.
        options: passed on to the module's forward.
    """
    began = time.perf_counter()
    costs, lengths = forward_flops(engine.module), (shard.prompt_lengths_B + shard.response_lengths_B).tolist()
    rows = tuple(balance(range(len(shard)), [costs.in_tokens(length) for length in lengths], engine.world_size)[engine.rank])
    mine = shard.select(rows)
    cuts = token_budget_cuts([lengths[row] for row in rows], budget, packed=packed, cost=costs.in_tokens)
    outputs = engine.forward([mine.select(cut) for cut in cuts], **options)
    tensors = {field: in_row_order(outputs, cuts, name, len(rows)) for name, field in names.items()}
    seconds, tally = time.perf_counter() - began, Tally()
    if rows:
        tally.add(f"perf/{SCORER[next(iter(names.values()))]}_score_tflops", flops_of(costs, [mine]) / 1e12, seconds)
    return Stored(Piece(rows, tensors), PieceInfo(rows, seconds, tally))


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
