"""Two ends in two threads: every bucket once, two on the way at most, and silence that ends with a name."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.weights import Link
from rlhf_dist.models.checksum import checksum
from rlhf_dist.workers.weight_link import IN_FLIGHT, Receiver, Sender

CPU = torch.device("cpu")
WEIGHTS = {f"w{number}": torch.full((100,), float(number)) for number in range(7)}


def link(transport: str, receivers: int, timeout_s: float = 20.0) -> Link:
    return Link(transport, "gloo", "127.0.0.1", 0, receivers, 400, timeout_s)  # type: ignore[arg-type]


def buckets(weights: Mapping[str, Tensor] = WEIGHTS) -> Iterator[dict[str, Tensor]]:
    for name, weight in weights.items():
        yield {name: weight.clone()}


class Taken:
    """A target that keeps what it gets."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.weights: dict[str, Tensor] = {}
        self._gate = gate

    def load(self, bucket: Mapping[str, Tensor]) -> None:
        if self._gate is not None:
            assert self._gate.wait(20)
        self.weights |= {name: weight.clone() for name, weight in bucket.items()}


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(4)
    yield pool
    pool.shutdown(wait=False, cancel_futures=True)


@pytest.mark.parametrize("transport", ["ipc", "broadcast"])
def test_every_receiver_gets_every_bucket_sync_after_sync(transport: str, threads: ThreadPoolExecutor) -> None:
    sender = Sender(link(transport, 2), CPU)
    assert sender.link.port > 0
    targets = [Taken(), Taken()]
    receivers: list[Any] = [None, None]

    def receive(rank: int) -> Any:
        receivers[rank] = receivers[rank] or Receiver(sender.link, rank, CPU)
        return receivers[rank].receive(targets[rank].load)

    for scale in (1.0, -2.0):
        weights = {name: weight * scale for name, weight in WEIGHTS.items()}
        receiving = [threads.submit(receive, rank) for rank in range(2)]
        sent = sender.send(buckets(weights))
        assert (sent.checksum, sent.bytes, sent.buckets) == (checksum(weights.items()), 7 * 400, 7)
        assert [each.result(20) for each in receiving] == [sent, sent]
        assert all(target.weights.keys() == weights.keys() for target in targets)
        assert all(torch.equal(target.weights[name], weight) for target in targets for name, weight in weights.items())


def test_export_runs_two_buckets_ahead_and_no_further(threads: ThreadPoolExecutor) -> None:
    """The receiver holds still: what may be exported meanwhile bounds the memory, and is what overlaps."""
    gate, exported = threading.Event(), []

    def exporting() -> Iterator[dict[str, Tensor]]:
        for bucket in buckets():
            exported.extend(bucket)
            yield bucket

    sender = Sender(link("ipc", 1), CPU)
    target = Taken(gate)
    receiving = threads.submit(lambda: Receiver(sender.link, 0, CPU).receive(target.load))
    sending = threads.submit(sender.send, exporting())
    deadline = time.monotonic() + 20
    while len(exported) <= IN_FLIGHT and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(exported) == IN_FLIGHT + 1, "two handed over, one in the hand"
    gate.set()
    assert sending.result(20) == receiving.result(20) and len(target.weights) == 7


def test_a_receiver_that_is_silent_is_named_with_its_rank(threads: ThreadPoolExecutor) -> None:
    sender = Sender(link("ipc", 2, timeout_s=1.0), CPU)
    receiving = threads.submit(lambda: Receiver(sender.link, 0, CPU).receive(Taken().load))
    began = time.monotonic()
    with pytest.raises(UserError, match="it did not take bucket 0") as caught:
        sender.send(buckets())
    assert caught.value.where == "weight sync by ipc, rollout rank 1" and time.monotonic() - began < 10
    with pytest.raises(UserError, match="it did not send bucket"):  # the first receiver waits for a bucket that never comes
        receiving.result(20)


def test_a_policy_that_is_silent_is_named(threads: ThreadPoolExecutor) -> None:
    sender = Sender(link("ipc", 1, timeout_s=1.0), CPU)
    receiver = Receiver(sender.link, 0, CPU)
    with pytest.raises(UserError, match="it did not send bucket 0") as caught:
        receiver.receive(Taken().load)
    assert caught.value.where == "weight sync by ipc, policy rank 0" and "rollout.weight_sync" in caught.value.fix


def test_a_policy_that_is_gone_is_named() -> None:
    sender = Sender(link("ipc", 1, timeout_s=1.0), CPU)
    gone = sender.link
    del sender
    with pytest.raises(UserError, match="it did not join the link") as caught:
        Receiver(gone, 0, CPU)
    assert caught.value.where.endswith("policy rank 0")


def test_what_the_target_refuses_reaches_the_caller(threads: ThreadPoolExecutor) -> None:
    """And the bucket is not acknowledged."""

    def refuse(bucket: Mapping[str, Tensor]) -> None:
        raise UserError("has no weight called w0")

    sender = Sender(link("ipc", 1, timeout_s=2.0), CPU)
    sending = threads.submit(sender.send, buckets())
    with pytest.raises(UserError, match="no weight called w0"):
        Receiver(sender.link, 0, CPU).receive(refuse)
    with pytest.raises(UserError, match="did not take bucket 0"):
        sending.result(20)
