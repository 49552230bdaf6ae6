"""Weights from the trainer to the sampler: a version, and a checksum that every rank must agree on (law 8)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from rlhf_dist.config.errors import UserError

MODULUS = 2**61 - 1


def checksum(weights: Iterable[tuple[str, Tensor]]) -> int:
    """A sum over all weights' bits, keyed by name: exact, and independent of the order and of how buckets were cut."""
    total = 0
    for name, tensor in weights:
        bits = tensor.detach().contiguous().view(-1).view(_INTEGER[tensor.element_size()])
        weighted = (bits.long() * (torch.arange(bits.numel(), device=bits.device) % 65521 + 1)).sum()
        total = (total + (int(weighted.item()) % MODULUS) * (_name_key(name))) % MODULUS
    return total


def copy_bucket(target: nn.Module, bucket: Mapping[str, Tensor]) -> None:
    """Writes a bucket of exported weights into a plain Hugging Face model.

    Raises:
        UserError: the model has no parameter of such a name.
    """
    parameters = dict(target.named_parameters())
    with torch.no_grad():
        for name, weight in bucket.items():
            if name not in parameters:
                raise UserError(f"the sampler's model has no weight called {name}", where="weight sync", fix="trainer and sampler must load the same architecture")
            parameters[name].copy_(weight)


_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _name_key(name: str) -> int:
    key = 1
    for byte in name.encode():
        key = (key * 257 + byte) % MODULUS
    return key
