"""How the bytes of a bucket get from policy rank 0 to the rollout ranks: memory that both map, or a broadcast."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing  # tells pickle how tensors of a GPU are shared
from torch import Tensor

from rlhf_dist.contracts.weights import Link

Write = Callable[[Tensor], None]
"""Fills the memory it is given, uint8."""


class Carrier(Protocol):
    """Moves bytes. What `give` returns stays alive until every receiver has taken the bytes."""

    def give(self, size: int, write: Write) -> tuple[bytes, Any]:
        """Has `size` bytes written and hands them over: what a receiver must know, and what must be kept."""
        ...

    def fetch(self, ticket: bytes, size: int) -> Tensor:
        """The bytes on the receiving side, uint8 [size]."""
        ...


class SharedMemory:
    """Nothing is sent: the receivers map the sender's memory.

    On a GPU that is CUDA IPC, as torch.multiprocessing has it. On a CPU it is a file without a name, which a receiver opens through the
    sender's entry in /proc: it takes no room in /dev/shm (64 MB in many a container) and is gone with the last process that holds it,
    however that ends; torch.multiprocessing would fork a daemon to look after names.

    Args:
        device: where the weights are, on both sides.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def give(self, size: int, write: Write) -> tuple[bytes, Any]:
        """A ticket that names the memory; the file, or the tensor, keeps it."""
        if self._device.type == "cpu":
            file = os.fdopen(os.memfd_create("weights"), "r+b", buffering=0)
            file.truncate(max(size, 1))
            path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
            write(_mapped(path, size))
            return path.encode(), file
        flat = torch.empty(size, dtype=torch.uint8, device=self._device)
        write(flat)
        return bytes(ForkingPickler.dumps(flat)), flat

    def fetch(self, ticket: bytes, size: int) -> Tensor:
        """Maps the sender's memory. It lasts as long as somebody holds it, on either side."""
        if self._device.type == "cpu":
            return _mapped(ticket.decode(), size)
        flat: Tensor = pickle.loads(ticket)
        return flat


class Broadcast:
    """A process group of policy rank 0 (rank 0 here) and the rollout ranks (1 and up), beside the default one.

    Args:
        link: backend, receivers, deadline.
        store: where the ranks meet.
        rank: of this process in that group.
        device: where the weights are; with gloo they travel from CPU to CPU.

    Raises:
        RuntimeError: another rank does not come within the deadline.
    """

    def __init__(self, link: Link, store: dist.Store, rank: int, device: torch.device) -> None:
        self._device = device if link.backend == "nccl" else torch.device("cpu")
        self._options = dist.BroadcastOptions()
        self._options.rootRank = 0
        timeout = timedelta(seconds=link.timeout_s)
        place = (dist.PrefixStore("group", store), rank, link.receivers + 1)
        if link.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group: Any = dist.ProcessGroupNCCL(*place, options)
        else:
            self._group = dist.ProcessGroupGloo(*place, timeout)

    def give(self, size: int, write: Write) -> tuple[bytes, Any]:
        """Begins the broadcast. On a GPU what is computed afterwards waits for it, so that two groups never collide there."""
        flat = torch.empty(size, dtype=torch.uint8, device=self._device)
        write(flat)
        work = self._group.broadcast([flat], self._options)
        if self._device.type != "cpu":
            work.wait()
        return b"", (work, flat)

    def fetch(self, ticket: bytes, size: int) -> Tensor:
        """Takes part in the broadcast."""
        flat = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._group.broadcast([flat], self._options).wait()
        return flat


def carrier_of(link: Link, store: dist.Store, rank: int, device: torch.device) -> Carrier:
    """The carrier of a link."""
    return SharedMemory(device) if link.transport == "ipc" else Broadcast(link, store, rank, device)


def _mapped(path: str, size: int) -> Tensor:
    return torch.from_file(path, shared=True, size=max(size, 1), dtype=torch.uint8)[:size]
