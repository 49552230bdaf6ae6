"""A key/value cache with a fixed place (slot) for every row that is being decoded, each row at its own length.

Rows in use are always slots 0 to n-1, so a decode step attends over plain views of the storage: no gather, no concatenation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache


@dataclass(frozen=True)
class PrefillPlan:
    """The next forward brings positions `start` and on of the rows in slots `index_U`; it attends over all positions up to its own."""

    index_U: Tensor
    start: int


@dataclass(frozen=True)
class DecodePlan:
    """The next forward brings one token for each of slots 0 to rows-1 and attends over `span` positions.

    Only slots `index_N` store theirs, at positions `lengths_N`; the rows behind them are idle.
    """

    rows: int
    span: int
    index_N: Tensor
    lengths_N: Tensor


@dataclass
class _Layer:
    """One layer's keys and values, [slots, kv_heads, max_len, head_dim] each (their head_dim may differ)."""

    keys: Tensor
    values: Tensor


class SlotCache(Cache):
    """Implements the transformers cache interface over slots. Set `plan`, then run the model.

    Storage is allocated at a layer's first update, from the shape, dtype and device of what the model brings. It is zeroed: masked
    positions are multiplied by probability 0, which does no harm to any finite number.

    Args:
        slots: rows held at once.
        max_len: positions of a row.
        for_cpu: laid out for `slot_attention`: fp32 whatever the model's dtype, and keys as columns of [head_dim, max_len].
    """

    def __init__(self, slots: int, max_len: int, for_cpu: bool = False) -> None:
        super().__init__(layers=[])
        self.slots, self.max_len, self._for_cpu = slots, max_len, for_cpu
        self.plan: PrefillPlan | DecodePlan = PrefillPlan(torch.zeros(0, dtype=torch.long), 0)
        self._stored: dict[int, _Layer] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores keys and values [b, kv_heads, q, head_dim] as `plan` says and returns what the queries attend over.

        Prefill: the rows' stored positions, then the new ones. Decode: views [n, kv_heads, span, head_dim] of the storage.
        """
        layer = self._stored.get(layer_idx)
        if layer is None:
            layer = self._stored[layer_idx] = self._allocate(key_states, value_states)
        plan = self.plan
        if isinstance(plan, PrefillPlan):
            return _prefill(layer.keys, key_states, plan), _prefill(layer.values, value_states, plan)
        return _decode(layer.keys, key_states, plan), _decode(layer.values, value_states, plan)

    def copy(self, source: int | Tensor, target: int | Tensor, length: int) -> None:
        """Copies the first `length` positions of slots into others; no slot may be both."""
        for layer in self._stored.values():
            for stored in (layer.keys, layer.values):
                stored[target, :, :length] = stored[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before the queries of the next forward; with rows of several lengths, those before the longest row's."""
        return self.plan.span - 1 if isinstance(self.plan, DecodePlan) else self.plan.start

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Key positions and their offset in the next forward."""
        return (self.plan.span if isinstance(self.plan, DecodePlan) else self.plan.start + query_length), 0

    def _allocate(self, key_states: Tensor, value_states: Tensor) -> _Layer:
        (_, heads, _, width), (_, value_heads, _, value_width) = key_states.shape, value_states.shape
        values = (self.slots, value_heads, self.max_len, value_width)
        if self._for_cpu:
            # numpy's zeros take no memory until they are written, which much of a ragged batch never is.
            keys = torch.from_numpy(np.zeros((self.slots, heads, width, self.max_len), np.float32)).transpose(2, 3)
            return _Layer(keys, torch.from_numpy(np.zeros(values, np.float32)))
        return _Layer(key_states.new_zeros(self.slots, heads, self.max_len, width), value_states.new_zeros(values))


def _prefill(stored: Tensor, states: Tensor, plan: PrefillPlan) -> Tensor:
    stored[plan.index_U, :, plan.start : plan.start + states.shape[2]] = states.to(stored.dtype)
    if plan.start == 0:
        return states
    return torch.cat([stored[plan.index_U, :, : plan.start].to(states.dtype), states], dim=2)


def _decode(stored: Tensor, states: Tensor, plan: DecodePlan) -> Tensor:
    # What idle rows bring is not kept: their storage would take memory.
    stored[plan.index_N, :, plan.lengths_N] = states[: len(plan.index_N), :, 0].to(stored.dtype)
    return stored[: plan.rows, :, : plan.span]
