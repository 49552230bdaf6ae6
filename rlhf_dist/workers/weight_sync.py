"""Weights from the trainer to the sampler: a version, and a checksum that every rank must agree on (law 8)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from rlhf_dist.config.errors import UserError
from rlhf_dist.models.checksum import MODULUS, checksum
from rlhf_dist.models.lora import named_weights, trained_weights


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
