"""This process as one rank: its device, its process group, and their orderly end."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rlhf_dist.engines.memory import keep_freed_memory
from rlhf_dist.models.quiet import quiet_libraries

COLLECTIVE_TIMEOUT_S = 1800.0
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


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


def launched_world_size() -> int | None:
    """World size if a launcher (deepspeed, torchrun) started this process, else None."""
    size = os.environ.get("WORLD_SIZE")
    return int(size) if size and "RANK" in os.environ else None


def start_process_group(
    rank: int, world_size: int, local_rank: int, address: str, port: int, timeout_s: float = COLLECTIVE_TIMEOUT_S
) -> Rank:
    """Joins the ranks: NCCL on GPUs, gloo on CPUs. Joining again as the same rank changes nothing.

    timeout_s: after which a collective gives up; where others supervise the ranks, it leaves them the first word.

    DeepSpeed's shared-memory op is left out on CPU: compiling it takes longer than most tests, and gloo needs none.

    Raises:
        RuntimeError: this process is another rank already, or one of another number of ranks.
    """
    if dist.is_initialized() and (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
        raise RuntimeError(
            f"this process is rank {dist.get_rank()} of {dist.get_world_size()}, it cannot become rank {rank} of {world_size}"
        )
    on_gpu = torch.cuda.is_available()
    place = (rank, world_size, local_rank, address, port)
    os.environ.update({name: str(value) for name, value in zip(LAUNCH_VARIABLES, place, strict=True)})
    deepspeed = quiet_deepspeed()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    else:
        keep_freed_memory()
    backend = "nccl" if on_gpu else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=timeout_s), auto_mpi_discovery=False, verbose=False)
    return Rank(rank, world_size, local_rank, f"cuda:{local_rank}" if on_gpu else "cpu")


def rank_alone(rank: int, world_size: int) -> Rank:
    """This process as one of several that never meet in a collective; nothing is imported for it."""
    if not torch.cuda.is_available():
        keep_freed_memory()
    return Rank(rank, world_size, 0, "cuda:0" if torch.cuda.is_available() else "cpu")


def stop_process_group() -> None:
    """Leaves the process group; without this, gloo threads may abort at interpreter exit. Without a group it does nothing.

    DeepSpeed keeps groups of its own over the one that ends, so it is DeepSpeed that ends it; and what told this process its place is
    forgotten, or a later run in the same process would look for the launcher that wrote it.
    """
    if not dist.is_initialized():
        return
    quiet_deepspeed().comm.destroy_process_group()
    for name in LAUNCH_VARIABLES:
        os.environ.pop(name, None)


def quiet_deepspeed() -> Any:
    """The deepspeed module, with the chatter of the libraries off: their bars and notes would drown the run's own progress."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "WARNING")
    quiet_libraries()
    import logging

    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
