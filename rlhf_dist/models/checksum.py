"""A checksum of weights: exact, and independent of their order and of how buckets were cut (law 8)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

MODULUS = 2**61 - 1
PERIOD = 65521
CHUNK = 4 * PERIOD
"""Numbers looked at side by side, a multiple of the period of the factors: their 64-bit copies fit a CPU's cache, which is 20 times as fast
as when they do not."""
GPU_CHUNKS = 16
"""So many of them at once on a GPU, which a single one would not fill."""

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(weights: Iterable[tuple[str, Tensor]]) -> int:
    """A sum over all weights' bits, keyed by name and place: exact, and independent of the order and of how buckets were cut.

    The checksum of all weights is the sum of the checksums of parts, modulo `MODULUS`.
    """
    return sum(_bits_sum(tensor) * _name_key(name) for name, tensor in weights) % MODULUS


def _bits_sum(tensor: Tensor) -> int:
    """Σ bits · factor in wrapping 64-bit arithmetic. Factors are below 2¹⁶ and the bits below 2³², so no change of one number is lost."""
    bits = tensor.detach().contiguous().view(-1).view(_INTEGER[tensor.element_size()])
    chunk = CHUNK if bits.device.type == "cpu" else GPU_CHUNKS * CHUNK
    factors = torch.arange(min(bits.numel(), chunk), device=bits.device) % PERIOD + 1
    total = torch.zeros((), dtype=torch.long, device=bits.device)
    for start in range(0, bits.numel(), chunk):
        part = bits[start : start + chunk]
        total += (part.long() * factors[: part.numel()]).sum()
    return int(total.item()) % MODULUS


def _name_key(name: str) -> int:
    key = 1
    for byte in name.encode():
        key = (key * 257 + byte) % MODULUS
    return key
