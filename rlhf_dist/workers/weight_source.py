"""The policy's side of a sync with a rollout group: every rank exports, rank 0 sends or keeps buckets to be fetched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.weights import BucketInfo, Link, SyncInfo
from rlhf_dist.engines.deepspeed import DeepSpeedEngine
from rlhf_dist.workers.weight_link import Sender
from rlhf_dist.workers.weight_sync import Count

Bucket = Mapping[str, Tensor]


class WeightSource:
    """Adapters are merged and 4-bit layers written out: rollout engines hold plain models.

    Args:
        engine: its export is collective under ZeRO 3; under the other stages every rank sums up its own, so that ranks that have drifted
            apart are noticed.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._engine = engine
        self._senders: dict[Link, Sender] = {}
        self._export: Iterator[Bucket] | None = None
        self._count = Count()

    def open(self, link: Link) -> Link:
        """Opens the store of a link on this rank; returns the link with its port."""
        sender = Sender(link, self._engine.device)
        self._senders[sender.link] = sender
        return sender.link

    def send(self, link: Link) -> SyncInfo:
        """Exports all weights; the rank that opened the link sends them.

        Raises:
            UserError: a receiver does not answer within the deadline.
        """
        buckets = self._engine.export_weights(merged=True, bucket_bytes=link.bucket_bytes)
        return self._senders[link].send(buckets) if link in self._senders else counted(buckets)

    def next(self, bucket_bytes: int) -> Stored[Bucket, BucketInfo]:
        """The next bucket, kept on rank 0 in host memory; after the last an empty one that says so."""
        if self._export is None:
            self._export, self._count = self._engine.export_weights(merged=True, bucket_bytes=bucket_bytes), Count()
        bucket = next(self._export, None)
        if bucket is None:
            self._export = None
            return Stored({}, BucketInfo(0, self._count.info()))
        self._count.add(bucket)
        kept = {name: weight.cpu() for name, weight in bucket.items()} if self._engine.rank == 0 else {}
        return Stored(kept, BucketInfo(sum(weight.nbytes for weight in bucket.values())))


def counted(buckets: Iterator[Bucket]) -> SyncInfo:
    """An export in numbers."""
    count = Count()
    for bucket in buckets:
        count.add(bucket)
    return count.info()
