"""Weights on their way from the policy to a rollout group: who stands where, which way they go, what was moved (law 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Transport = Literal["ipc", "broadcast", "object_store"]


@dataclass(frozen=True)
class Place:
    """Where a rank's weights are. Equal nodes share memory, equal devices are one device.

    node: empty where that is not known. device: `cpu`, or what names a GPU in the world. address: of this process's node.
    """

    node: str
    device: str
    address: str


@dataclass(frozen=True)
class Link:
    """A way from policy rank 0 to all rollout ranks, kept from the first sync to the last.

    address, port: the store where both sides meet; port 0 until it is open. backend: of a broadcast. receivers: rollout ranks.
    bucket_bytes: cap of a bucket (a larger weight travels alone). timeout_s: longest wait for the other side.
    """

    transport: Transport
    backend: Literal["gloo", "nccl"]
    address: str
    port: int
    receivers: int
    bucket_bytes: int
    timeout_s: float


@dataclass(frozen=True)
class SyncInfo:
    """What a rank holds after a sync (`models.checksum`), and what was moved to get there: bytes and buckets, 0 where memory is shared."""

    checksum: int
    bytes: int = 0
    buckets: int = 0


@dataclass(frozen=True)
class BucketInfo:
    """A bucket that stays with the workers. done: the whole export in numbers, once there is no further bucket."""

    bytes: int
    done: SyncInfo | None = None
