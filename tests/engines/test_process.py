"""One process as one rank: joining is harmless when repeated, leaving is complete, and nothing of a run stays in the environment."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rlhf_dist.engines.process import (
    LAUNCH_VARIABLES,
    Rank,
    free_port,
    launched_world_size,
    quiet_deepspeed,
    rank_alone,
    start_process_group,
    stop_process_group,
)


def test_a_free_port_can_be_listened_on() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", port := free_port()))
        server.listen()
        assert server.getsockname()[1] == port


@pytest.mark.parametrize(
    ("variables", "size"),
    [
        ({}, None),
        ({"WORLD_SIZE": "2"}, None),
        ({"RANK": "0"}, None),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 2),
        ({"RANK": "0", "WORLD_SIZE": ""}, None),
    ],
)
def test_a_launcher_is_known_by_its_variables(variables, size, monkeypatch) -> None:
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_world_size() == size


def test_joining_again_changes_nothing(plain_rank: Rank) -> None:
    assert (plain_rank.rank, plain_rank.world_size, plain_rank.local_rank) == (0, 1, 0)
    group = dist.group.WORLD
    assert start_process_group(0, 1, 0, "127.0.0.1", free_port()) == plain_rank
    assert dist.group.WORLD is group


def test_a_process_cannot_become_another_rank(plain_rank: Rank) -> None:
    with pytest.raises(RuntimeError, match="rank 0 of 1, it cannot become rank 1 of 2"):
        start_process_group(1, 2, 0, "127.0.0.1", free_port())


def test_after_leaving_a_process_can_join_and_train_again(plain_rank: Rank) -> None:
    """DeepSpeed caches groups: what it cached must not outlive the process group."""
    for stage in (1, 3):
        assert train_once(stage) == pytest.approx(2.0)
        stop_process_group()
        assert not dist.is_initialized() and launched_world_size() is None and not any(name in os.environ for name in LAUNCH_VARIABLES)
        stop_process_group()
        start_process_group(0, 1, 0, "127.0.0.1", free_port())
    assert train_once(2) == pytest.approx(2.0)


def test_a_rank_that_stands_alone_joins_nothing(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.distributed.is_initialized()
    assert rank_alone(1, 3) == Rank(1, 3, 0, "cpu") and torch.distributed.is_initialized() == before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert rank_alone(1, 3).device == "cuda:0", "Ray shows a process its own GPUs alone"


def test_leaving_without_a_group_leaves_the_launchers_variables(plain_rank: Rank, monkeypatch) -> None:
    stop_process_group()
    monkeypatch.setenv("RANK", "7")
    stop_process_group()
    assert os.environ["RANK"] == "7"


def train_once(stage: int) -> float:
    """Gradient norm of Σ w·x over four weights and x = 1: √4."""
    model = nn.Linear(4, 1, bias=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine, *_ = quiet_deepspeed().initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    return float(engine.get_global_grad_norm())
