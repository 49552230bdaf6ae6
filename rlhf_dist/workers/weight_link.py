"""The two ends of a link: buckets go over one by one, each is acknowledged, and at most two are on their way.

What a receiver must know of a bucket stands in a TCP store on policy rank 0, the bytes go by a carrier. Every wait has a deadline.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pickle
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_dist.config.errors import first_line
from rlhf_dist.contracts.group import Late
from rlhf_dist.contracts.weights import Link, SyncInfo
from rlhf_dist.workers.weight_bucket import Slot, fill, room_for, slots_of, views
from rlhf_dist.workers.weight_carriers import carrier_of
from rlhf_dist.workers.weight_sync import Count

Bucket = Mapping[str, Tensor]
POLICY = "policy rank 0"
IN_FLIGHT = 2
"""Buckets that wait for their acknowledgement while the next is exported: one being taken, one ready."""


@dataclass(frozen=True)
class Parcel:
    """What a receiver must know of a bucket. sent: behind the last one, the whole export in numbers."""

    slots: tuple[Slot, ...] = ()
    ticket: bytes = b""
    sent: SyncInfo | None = None


class Sender:
    """Policy rank 0. The store is open from the start; the carrier, for which both sides must be there, from the first sync.

    Args:
        link: its address is where the store listens, and nowhere else; `self.link` has the port.
        device: where the weights are.
    """

    def __init__(self, link: Link, device: torch.device) -> None:
        self._device, self._timeout = device, timedelta(seconds=link.timeout_s)
        listener = socket.create_server((link.address, 0), backlog=link.receivers)
        port = int(listener.getsockname()[1])
        self._store = dist.TCPStore(
            link.address, port, None, True, self._timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self.link = dataclasses.replace(link, port=port)
        self._carrier: Any = None
        self._syncs = 0

    def send(self, buckets: Iterable[Bucket]) -> SyncInfo:
        """Sends all buckets; returns once every receiver has taken them.

        Raises:
            UserError: a receiver does not answer within the deadline.
        """
        sync, count, on_the_way = self._syncs, Count(), deque[tuple[int, Any]]()
        self._syncs += 1
        number = 0
        for bucket in buckets:
            if len(on_the_way) == IN_FLIGHT:
                self._acknowledged(sync, *on_the_way.popleft())
            on_the_way.append((number, self._hand_over(sync, number, bucket)))
            count.add(bucket)  # while the receivers take it
            number += 1
        put(self._store, f"{sync}/{number}", pickle.dumps(Parcel(sent=count.info())))
        for each in (*on_the_way, (number, None)):
            self._acknowledged(sync, *each)
        return count.info()

    def _hand_over(self, sync: int, number: int, bucket: Bucket) -> Any:
        if self._carrier is None:
            with blaming("rollout", "a rank did not join the link", self.link):
                self._carrier = carrier_of(self.link, self._store, 0, self._device)
        slots = slots_of(bucket)
        with blaming("rollout", f"bucket {number} could not be handed over", self.link):
            ticket, kept = self._carrier.give(room_for(slots), functools.partial(fill, slots, bucket))
            put(self._store, f"{sync}/{number}", pickle.dumps(Parcel(slots, ticket)))
        return kept

    def _acknowledged(self, sync: int, number: int, kept: Any) -> None:
        """Waits until every receiver has bucket `number`; until then `kept` keeps its memory."""
        keys = [f"{sync}/{number}/{rank}" for rank in range(self.link.receivers)]
        for rank, key in enumerate(keys):
            with blaming(f"rollout rank {rank}", f"it did not take bucket {number}", self.link):
                self._store.wait([key], self._timeout)
        for key in (f"{sync}/{number}", *keys):
            self._store.delete_key(key)


class Receiver:
    """A rollout rank.

    Args:
        link: with its port.
        rank: of this process among the rollout ranks.
        device: where the weights are.

    Raises:
        UserError: the policy does not answer within the deadline.
    """

    def __init__(self, link: Link, rank: int, device: torch.device) -> None:
        self._link, self._rank, self._timeout = link, rank, timedelta(seconds=link.timeout_s)
        with blaming(POLICY, "it did not join the link", link):
            self._store = dist.TCPStore(link.address, link.port, None, False, self._timeout, wait_for_workers=False)
            self._carrier = carrier_of(link, self._store, rank + 1, device)
        self._syncs = 0

    def receive(self, load: Callable[[Bucket], None]) -> SyncInfo:
        """Loads bucket after bucket; returns what the policy says it sent.

        Raises:
            UserError: the policy does not answer within the deadline, or what `load` raises.
        """
        sync = self._syncs
        self._syncs += 1
        for number in itertools.count():
            key = f"{sync}/{number}"
            with blaming(POLICY, f"it did not send bucket {number}", self._link):
                self._store.wait([key], self._timeout)
                parcel: Parcel = pickle.loads(self._store.get(key))
            if parcel.sent is None:
                self._load(number, parcel, load)
            with blaming(POLICY, f"it did not hear of bucket {number}", self._link):
                put(self._store, f"{key}/{self._rank}", b"")
            if parcel.sent is not None:
                return parcel.sent
        raise AssertionError("the numbers do not end")

    def _load(self, number: int, parcel: Parcel, load: Callable[[Bucket], None]) -> None:
        with blaming(POLICY, f"bucket {number} could not be fetched", self._link):
            flat = self._carrier.fetch(parcel.ticket, room_for(parcel.slots))
        load(views(parcel.slots, flat))
        if flat.is_cuda:  # the sender may use the memory again once it is told
            torch.cuda.synchronize(flat.device)


def put(store: dist.Store, key: str, value: bytes) -> None:
    """Sets a key. Stores take bytes, whatever their annotations say."""
    store.set(key, value)  # type: ignore[arg-type]


@contextmanager
def blaming(peer: str, what: str, link: Link) -> Iterator[None]:
    """Turns the failure of a wait, or of the connection, into an error that names the other side.

    Raises:
        Late: in place of what torch raised: whoever supervises both sides may start the other one anew.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:  # what stores, gloo, NCCL and the mapping of memory raise
        reason = first_line(error)
        fix = (
            "its process may have died or hang: see the Ray logs; another transport (rollout.weight_sync) may suit this cluster; "
            f"the wait ends after {link.timeout_s:g} s, part of placement.call_timeout_s"
        )
        raise Late(f"{what}: {reason}", where=f"weight sync by {link.transport}, {peer}", fix=fix) from error
