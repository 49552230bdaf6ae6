"""Weights from the trainer to the sampler: a version, and a checksum that every rank must agree on (law 8)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.weights import SyncInfo
from rlhf_dist.models.checksum import MODULUS, checksum
from rlhf_dist.models.lora import named_weights, trained_weights


class WeightTarget(Protocol):
    """What weights are pushed to: the copy of a native sampler (`CopyTarget`), or `rollout.vllm.VllmEngine`."""

    def load_bucket(self, bucket: Mapping[str, Tensor]) -> None:
        """Takes some of the weights, under the names of the model's export."""
        ...

    def finish_sync(self, version: int) -> int:
        """All have come: returns the checksum of what is held now.

        Raises:
            UserError: a weight did not come.
        """
        ...


class CopyTarget:
    """Writes exported weights into those of another model, and reads them back.

    Args:
        weights: the model's own, by name; not copies.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._held: dict[str, int] = {}

    def load_bucket(self, bucket: Mapping[str, Tensor]) -> None:
        """Copies some of the weights; summed up bucket by bucket, while the next is on its way.

        Raises:
            UserError: the model has no weight of such a name or shape.
        """
        for name, weight in bucket.items():
            held = self._weights.get(name)
            if held is None:
                raise mismatch(f"has no weight called {name}")
            if held.shape != weight.shape:
                raise mismatch(f"holds {name} as {list(held.shape)}, what came is {list(weight.shape)}")
            with torch.no_grad():
                held.copy_(weight)
            self._held[name] = checksum([(name, held)])

    def finish_sync(self, version: int) -> int:
        """The checksum of the model's own weights.

        Raises:
            UserError: a weight did not come: it would stay at the version before, and every sample would be off-policy unseen.
        """
        held, self._held = self._held, {}
        missing = sorted(self._weights.keys() - held.keys())
        if missing:
            raise mismatch(f"lacks {len(missing)} of {len(self._weights)} weights for version {version}, {missing[0]} first")
        return sum(held.values()) % MODULUS


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a plain Hugging Face model under the names of its export; not copies. Not for a model that ZeRO 3 has sharded."""
    return {name: weight() for name, _, weight in named_weights(model)}


def trained_weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights of a model under its own names (with LoRA: the adapters); not copies."""
    return {name: weight() for name, _, weight in trained_weights(model)}


def copy_weights(weights: Mapping[str, Tensor], buckets: Iterable[Mapping[str, Tensor]], version: int) -> SyncInfo:
    """Writes exported weights into those of another model in this process, bucket by bucket.

    Raises:
        UserError: the model has no weight of such a name, or it does not hold what was sent: a weight did not come.
    """
    target, count = CopyTarget(weights), Count()
    for bucket in buckets:
        target.load_bucket(bucket)
        count.add(bucket)
    return adopted(target, version, count.info())


class Count:
    """What was sent so far."""

    def __init__(self) -> None:
        self._checksum = self._bytes = self._buckets = 0

    def add(self, bucket: Mapping[str, Tensor]) -> None:
        """Counts a bucket."""
        self._checksum += checksum(bucket.items())
        self._bytes += sum(weight.nbytes for weight in bucket.values())
        self._buckets += 1

    def info(self) -> SyncInfo:
        """All of it."""
        return SyncInfo(self._checksum % MODULUS, self._bytes, self._buckets)


def adopted(target: WeightTarget, version: int, sent: SyncInfo) -> SyncInfo:
    """Ends a sync on the receiving side.

    Raises:
        UserError: the target does not hold what was sent.
    """
    if target.finish_sync(version) != sent.checksum:
        raise mismatch("does not hold what the trainer sent")
    return sent


def mismatch(what: str) -> UserError:
    """The model of a sampler cannot be the trainer's."""
    fix = "trainer and sampler must load the same architecture in the same precision"
    return UserError(f"the sampler's model {what}", where="weight sync", fix=fix)
