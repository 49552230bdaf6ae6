"""Replaying PPO: adapters, half precision and packed rows give the losses that were recorded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_dist.contracts.moments import Moments
from rlhf_dist.contracts.roles import UpdateRequest
from rlhf_dist.runs.capsule import TRAINED, Capsule, read_capsule
from rlhf_dist.workers.policy import PolicyWorker
from rlhf_dist.workers.replay import TOLERANCE, replay
from rlhf_dist.workers.value import ValueWorker

CASES: dict[str, dict[str, Any]] = {
    "sequence means with an entropy bonus": {"algorithm": {"reduction": "sequence_mean", "entropy_coef": 0.1}},
    "weighted tokens": {"algorithm": {"importance": {"correction": "truncated"}}},
    "packed": {"policy.packing": True},
    "adapters": {"policy.lora": {"r": 2}},
    "bf16": {"policy.dtype": "bf16"},
}


def capsule_of(changes: dict[str, Any], configured: Any, plain_rank: Any, shard_of: Any, ragged: Any, folder: Path) -> Capsule:
    """Of the second step of a policy: an advantage of row 1 is NaN."""
    worker, shard = PolicyWorker(configured({"policy.optim": {"lr": 0.02}} | changes), plain_rank), shard_of(ragged)
    draw = torch.Generator().manual_seed(1)
    old_BT = torch.where(shard.response_mask_BT, -1.0 - torch.rand(shard.response_mask_BT.shape, generator=draw), torch.nan)
    advantages_BT = torch.randn(shard.response_mask_BT.shape, generator=draw)
    rows = UpdateRequest(((0, 1), (2, 3, 4), (5, 6)), 22.0, str(folder), 1)
    for bad in (0.0, math.nan):
        spoilt_BT = advantages_BT.clone()
        spoilt_BT[1, 0] += bad
        worker.load_experience([shard.replace(old_logprobs_BT=old_BT, advantages_BT=spoilt_BT)], Moments(2, 0.0, 1.0))
        info = worker.update(rows)
    assert info.fault == "loss" and info.capsule == str(folder)
    return read_capsule(folder)


@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_those_that_were_recorded(
    case: str, configured: Any, plain_rank: Any, shard_of: Any, ragged: Any, tmp_path: Path
) -> None:
    capsule = capsule_of(CASES[case], configured, plain_rank, shard_of, ragged, tmp_path / "one")
    found = replay(capsule)
    assert found.reproduced and [math.isfinite(each.now) for each in found.microbatches] == [False, True, True]
    for each in found.microbatches[1:]:
        assert abs(each.now - each.recorded) <= TOLERANCE[found.dtype] * each.size and each.size > 0
        terms = [sample.loss for sample in found.samples if sample.microbatch == each.number]
        assert math.fsum(terms) == pytest.approx(each.now, rel=1e-5 if found.dtype == "fp32" else 1e-2, abs=1e-6 * each.size)
    assert [sample.texts["prompt"] for sample in found.samples if sample.fault] == ["prompt 1"]
    assert found.gradient_fault and found.grad_norm is not None and not math.isfinite(found.grad_norm)
    assert (tmp_path / "one" / TRAINED).exists() == (case == "adapters") != (tmp_path / "one" / "model").exists()


def test_the_value_models_adapters_and_head_are_those_of_the_moment(
    configured: Any, plain_rank: Any, shard_of: Any, ragged: Any, tmp_path: Path
) -> None:
    worker, shard = ValueWorker(configured({"value.lora": {"r": 2}, "value.optim": {"lr": 0.1}}), plain_rank), shard_of(ragged)
    for bad in (1.0, 1.0, math.nan):
        returns_BT = torch.ones(shard.response_mask_BT.shape)
        returns_BT[0, 0] = bad
        worker.load_experience([shard.replace(values_BT=torch.zeros_like(returns_BT), returns_BT=returns_BT)], Moments())
        worker.update(UpdateRequest(((0,), (1, 2, 3, 4, 5, 6)), 22.0, str(tmp_path / "one"), 1))
    capsule = read_capsule(tmp_path / "one")
    found = replay(capsule)
    assert found.reproduced and found.microbatches[1].now == pytest.approx(capsule.parts[0].losses[1], rel=1e-6)
