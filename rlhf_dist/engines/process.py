"""This process as one rank: its device, its process group, and their orderly end."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Rank:
    """Where this process stands among the ranks of its engines."""

    rank: int
    world_size: int
    local_rank: int
    device: str


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def host_address() -> str:
    """This host's address as other hosts of the cluster see it; loopback where the name does not resolve."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def launched_world_size() -> int | None:
    """World size if a launcher (deepspeed, torchrun) started this process, else None."""
    size = os.environ.get("WORLD_SIZE")
    return int(size) if size and "RANK" in os.environ else None


def start_process_group(rank: int, world_size: int, local_rank: int, address: str, port: int) -> Rank:
    """Joins the ranks: NCCL on GPUs, gloo on CPUs.

    DeepSpeed's shared-memory op is left out on CPU: compiling it takes longer than most tests, and gloo needs none.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank), MASTER_ADDR=address, MASTER_PORT=str(port)
    )
    deepspeed = quiet_deepspeed()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", timeout=COLLECTIVE_TIMEOUT, auto_mpi_discovery=False, verbose=False)
    return Rank(rank, world_size, local_rank, f"cuda:{local_rank}" if on_gpu else "cpu")


def stop_process_group() -> None:
    """Leaves the process group; without this, gloo threads may abort at interpreter exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def quiet_deepspeed() -> Any:
    """The deepspeed module with its per-step logging off."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "WARNING")
    import logging

    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
