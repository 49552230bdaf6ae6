"""A key/value cache with a fixed place (slot) for every row that is being decoded, each row at its own length.

Rows in use are always slots 0 to n-1, so a decode step attends over plain views of the storage: no gather, no concatenation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


@dataclass(frozen=True)
class PrefillPlan:
    """Where the next forward's keys and values go: row `sources[i]` of the forward into slot `first + i`."""

    first: int
    sources: Tensor


@dataclass(frozen=True)
class DecodePlan:
    """The next forward brings one token for each of slots 0 to rows-1, at positions `lengths_N`; it attends over `span` positions."""

    rows: int
    span: int
    index_N: Tensor
    lengths_N: Tensor


@dataclass
class _Layer:
    """One layer's storage: keys [slots, kv_heads, max_len, head_dim], values likewise (their head_dim may differ)."""

    keys: Tensor
    values: Tensor


class SlotCache(Cache):
    """Implements the transformers cache interface over slots. Set `plan`, then run the model.

    Storage is allocated at a layer's first update, from the shape, dtype and device of what the model brings. It is zeroed: masked
    positions are multiplied by probability 0, which does no harm to any finite number.

    Args:
        slots: rows held at once.
        max_len: positions of a row.
    """

    def __init__(self, slots: int, max_len: int) -> None:
        super().__init__(layers=[])
        self.slots, self.max_len = slots, max_len
        self.plan: PrefillPlan | DecodePlan = PrefillPlan(0, torch.zeros(0, dtype=torch.long))
        self._stored: dict[int, _Layer] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores keys and values [b, kv_heads, q, head_dim] as `plan` says and returns what the queries attend over.

        Prefill: the same tensors (rows start at position 0). Decode: views [n, kv_heads, span, head_dim] of the storage.
        """
        layer = self._stored.get(layer_idx)
        if layer is None:
            layer = self._stored[layer_idx] = _Layer(self._storage(key_states), self._storage(value_states))
        plan = self.plan
        if isinstance(plan, PrefillPlan):
            return _prefill(layer.keys, key_states, plan), _prefill(layer.values, value_states, plan)
        return _decode(layer.keys, key_states, plan), _decode(layer.values, value_states, plan)

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one slot into another."""
        for layer in self._stored.values():
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before the queries of the next forward; with rows of several lengths, those before the longest row's."""
        return self.plan.span - 1 if isinstance(self.plan, DecodePlan) else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Key positions and their offset in the next forward."""
        return (self.plan.span if isinstance(self.plan, DecodePlan) else query_length), 0

    def _storage(self, states: Tensor) -> Tensor:
        return torch.zeros(self.slots, states.shape[1], self.max_len, states.shape[3], dtype=states.dtype, device=states.device)


def _prefill(stored: Tensor, states: Tensor, plan: PrefillPlan) -> Tensor:
    rows, width = plan.sources.shape[0], states.shape[2]
    stored[plan.first : plan.first + rows, :, :width] = states[plan.sources]
    return states


def _decode(stored: Tensor, states: Tensor, plan: DecodePlan) -> Tensor:
    stored[plan.index_N, :, plan.lengths_N] = states[:, :, 0]
    return stored[: plan.rows, :, : plan.span]
