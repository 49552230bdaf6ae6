"""Bytes between two ends: mapped memory that outlives its sender's interest, and a broadcast beside the default process group."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rlhf_dist.contracts.weights import Link
from rlhf_dist.workers.weight_carriers import Broadcast, SharedMemory, carrier_of

CPU = torch.device("cpu")
READER = """
import sys, torch
from rlhf_dist.workers.weight_carriers import SharedMemory
carrier = SharedMemory(torch.device("cpu"))
flat = carrier.fetch(sys.stdin.buffer.read(), 3)
print(flat.tolist(), flush=True)
flat[0] = 9
"""


def link(transport: str, receivers: int = 1, timeout_s: float = 20.0) -> Link:
    return Link(transport, "gloo", "127.0.0.1", 0, receivers, 100, timeout_s)  # type: ignore[arg-type]


def test_another_process_maps_the_memory_itself() -> None:
    memory: list[torch.Tensor] = []
    ticket, kept = SharedMemory(CPU).give(3, lambda flat: memory.append(flat.copy_(torch.tensor([1, 2, 3]))))
    done = subprocess.run([sys.executable, "-c", READER], input=ticket, capture_output=True, timeout=60, check=True)
    assert done.stdout.decode().strip() == "[1, 2, 3]"
    assert memory[0].tolist() == [9, 2, 3] and kept, "what the reader wrote is seen here: nothing was copied"


def test_mapped_memory_lasts_as_long_as_somebody_holds_it() -> None:
    carrier = SharedMemory(CPU)
    ticket, kept = carrier.give(1000, lambda flat: flat.fill_(7))  # type: ignore[arg-type, return-value]
    fetched = carrier.fetch(ticket, 1000)
    path = ticket.decode()
    del kept
    assert fetched.sum() == 7000 and not Path(path).exists(), "the sender's hold has ended, the mapping has not"


def test_an_empty_bucket_is_a_bucket() -> None:
    carrier = SharedMemory(CPU)
    ticket, kept = carrier.give(0, lambda flat: None)
    assert carrier.fetch(ticket, 0).numel() == 0 and kept


def test_a_broadcast_reaches_every_receiver_beside_the_default_group() -> None:
    store = dist.HashStore()
    wire = link("broadcast", receivers=2)
    with ThreadPoolExecutor(3) as threads:
        carriers = list(threads.map(lambda rank: carrier_of(wire, store, rank, CPU), range(3)))
        assert all(isinstance(carrier, Broadcast) for carrier in carriers)
        fetched = [threads.submit(carrier.fetch, b"", 5) for carrier in carriers[1:]]
        ticket, (work, kept) = carriers[0].give(5, lambda flat: flat.copy_(torch.arange(5)))  # type: ignore[arg-type, return-value]
        work.wait()
        assert ticket == b"" and kept.tolist() == [0, 1, 2, 3, 4]
        assert [each.result().tolist() for each in fetched] == [[0, 1, 2, 3, 4]] * 2


def test_a_receiver_that_never_joins_is_noticed_within_the_deadline() -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    with pytest.raises(RuntimeError):
        carrier_of(link("broadcast", timeout_s=1.0), store, 0, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_gpu_is_mapped_too() -> None:
    carrier = SharedMemory(torch.device("cuda:0"))
    ticket, kept = carrier.give(3, lambda flat: flat.copy_(torch.tensor([1, 2, 3])))  # type: ignore[arg-type, return-value]
    reader = READER.replace('"cpu"', '"cuda:0"')
    done = subprocess.run([sys.executable, "-c", reader], input=ticket, capture_output=True, timeout=120, check=True)
    assert done.stdout.decode().strip() == "[1, 2, 3]" and kept.tolist() == [9, 2, 3]
