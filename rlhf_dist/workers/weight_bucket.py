"""A bucket of weights as one run of bytes: many small tensors then cost one hand-over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 256
"""Bytes: every weight begins where any dtype, and a vectorised copy, may begin."""


@dataclass(frozen=True)
class Slot:
    """A weight's place in the bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    bytes: int


def slots_of(bucket: Mapping[str, Tensor]) -> tuple[Slot, ...]:
    """Places for the weights of a bucket, one after another."""
    slots: list[Slot] = []
    start = 0
    for name, weight in bucket.items():
        slots.append(Slot(name, weight.dtype, tuple(weight.shape), start, weight.nbytes))
        start += -(-weight.nbytes // ALIGNMENT) * ALIGNMENT
    return tuple(slots)


def room_for(slots: tuple[Slot, ...]) -> int:
    """Bytes that hold them all."""
    return slots[-1].start + slots[-1].bytes if slots else 0


def views(slots: tuple[Slot, ...], flat: Tensor) -> dict[str, Tensor]:
    """The weights inside the bytes; not copies.

    Args:
        flat: uint8, `room_for(slots)` bytes or more, as aligned as an allocator leaves it.
    """
    return {slot.name: flat[slot.start : slot.start + slot.bytes].view(slot.dtype).view(slot.shape) for slot in slots}


def fill(slots: tuple[Slot, ...], bucket: Mapping[str, Tensor], flat: Tensor) -> None:
    """Copies the weights to their places."""
    for name, place in views(slots, flat).items():
        place.copy_(bucket[name])
