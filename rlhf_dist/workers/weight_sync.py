"""Weights from the trainer to the sampler: a version, and a checksum that every rank must agree on (law 8)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from rlhf_dist.config.errors import UserError
from rlhf_dist.models.lora import named_weights, trained_weights

MODULUS = 2**61 - 1
PERIOD = 65521
CHUNK = 64 * PERIOD
"""Numbers looked at side by side: bounds the memory that a checksum needs. A multiple of the period of the factors."""

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(weights: Iterable[tuple[str, Tensor]]) -> int:
    """A sum over all weights' bits, keyed by name and place: exact, and independent of the order and of how buckets were cut.

    The checksum of all weights is the sum of the checksums of parts, modulo `MODULUS`.
    """
    return sum(_bits_sum(tensor) * _name_key(name) for name, tensor in weights) % MODULUS


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a plain Hugging Face model under the names of its export; not copies. Not for a model that ZeRO 3 has sharded."""
    return {name: weight() for name, _, weight in named_weights(model)}


def trained_weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights of a model under its own names (with LoRA: the adapters); not copies."""
    return {name: weight() for name, _, weight in trained_weights(model)}


def copy_weights(weights: Mapping[str, Tensor], buckets: Iterable[Mapping[str, Tensor]]) -> int:
    """Writes exported weights into those of another model, bucket by bucket; returns their checksum.

    Raises:
        UserError: the model has no weight of such a name, or it does not hold what was sent: a weight did not come.
    """
    sent = 0
    with torch.no_grad():
        for bucket in buckets:
            for name, weight in bucket.items():
                if name not in weights:
                    raise _mismatch(f"has no weight called {name}")
                weights[name].copy_(weight)
            sent += checksum(bucket.items())
    held = checksum(weights.items())
    if held != sent % MODULUS:
        raise _mismatch("does not hold what the trainer sent")
    return held


def _mismatch(what: str) -> UserError:
    fix = "trainer and sampler must load the same architecture in the same precision"
    return UserError(f"the sampler's model {what}", where="weight sync", fix=fix)


def _bits_sum(tensor: Tensor) -> int:
    """Σ bits · factor in wrapping 64-bit arithmetic. Factors are below 2¹⁶ and the bits below 2³², so no change of one number is lost."""
    bits = tensor.detach().contiguous().view(-1).view(_INTEGER[tensor.element_size()])
    factors = torch.arange(min(bits.numel(), CHUNK), device=bits.device) % PERIOD + 1
    total = torch.zeros((), dtype=torch.long, device=bits.device)
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK]
        total += (part.long() * factors[: part.numel()]).sum()
    return int(total.item()) % MODULUS


def _name_key(name: str) -> int:
    key = 1
    for byte in name.encode():
        key = (key * 257 + byte) % MODULUS
    return key
