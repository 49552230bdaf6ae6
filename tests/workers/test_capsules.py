"""Capsules from a real worker: when they are written, how many, and that a disk that is full costs the capsule alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_dist.contracts.moments import Moments
from rlhf_dist.contracts.roles import UpdateInfo, UpdateRequest
from rlhf_dist.runs.capsule import read_capsule
from rlhf_dist.workers import capsules
from rlhf_dist.workers.replay import replay
from rlhf_dist.workers.value import ValueWorker

Update = Callable[..., UpdateInfo]
ROWS = ((0, 1, 2), (), (3, 4, 5, 6))


@pytest.fixture
def worker(configured: Any, plain_rank: Any) -> ValueWorker:
    """Of the value model, after one good step."""
    return ValueWorker(configured({"value.optim": {"lr": 0.02, "schedule": "constant"}}), plain_rank)


@pytest.fixture
def update(worker: ValueWorker, shard_of: Any, ragged: Any) -> Update:
    """`update(folder, left, bad)`: loads the experience, in which row 5 has a return that is `bad`, and takes a step."""

    def step(folder: Path | str, left: int, bad: float, load: bool = True) -> UpdateInfo:
        shard = shard_of(ragged)
        returns_BT = torch.ones(shard.response_mask_BT.shape)
        returns_BT[5, 2] = bad
        if load:
            worker.load_experience([shard.replace(values_BT=torch.zeros_like(returns_BT), returns_BT=returns_BT)], Moments())
        return worker.update(UpdateRequest(ROWS, 22.0, str(folder), left))

    return step


def test_what_is_finite_is_not_written_down(update: Update, tmp_path: Path) -> None:
    info = update(tmp_path / "one", 5, 1.0)
    assert (info.fault, info.capsule, info.unsound) == ("", "", "") and not (tmp_path / "one").exists()


def test_a_capsule_holds_the_weights_of_its_moment_and_replays_at_any_time(update: Update, tmp_path: Path) -> None:
    update("", 0, 1.0)
    info = update(tmp_path / "one", 5, math.inf)
    assert info.fault == "loss" and info.capsule == str(tmp_path / "one") and not math.isfinite(info.step.grad_norm)
    update("", 0, 1.0)  # the weights go on
    capsule = read_capsule(tmp_path / "one")
    assert (
        capsule.facts.role == "value" and capsule.facts.denominator == 22.0 and capsule.parts[0].microbatches == ((0, 1, 2), (3, 4, 5, 6))
    )
    found = replay(capsule)
    assert (
        found.reproduced
        and found.microbatches[0].now == pytest.approx(capsule.parts[0].losses[0], rel=1e-6)
        and found.microbatches[0].now > 0
    )
    wrong = [sample for sample in found.samples if sample.fault]
    assert [sample.texts["prompt"] for sample in wrong] == ["prompt 5"]
    assert wrong[0].fault.startswith("returns_BT is inf at response token 3 (id ")
    assert [sample.fault for sample in replay(capsule, gradient=False).samples] == [sample.fault for sample in found.samples]


def test_no_more_are_written_than_may_be_and_an_older_one_gives_way(update: Update, tmp_path: Path) -> None:
    (tmp_path / "one" / "stale").mkdir(parents=True)
    assert update(tmp_path / "one", 1, math.nan).capsule and not (tmp_path / "one" / "stale").exists()
    again = update(tmp_path / "two", 1, math.nan, load=False)
    assert again.fault == "loss" and again.capsule == "" and not (tmp_path / "two").exists()
    assert update("", 3, math.nan).capsule == "" and update(tmp_path / "three", 0, math.nan).capsule == ""


@pytest.mark.parametrize("part", ["write_part", "export_model", "seal"])
def test_a_disk_that_is_full_costs_the_capsule_and_not_the_run(
    part: str, update: Update, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(capsules, part, full)
    info = update(tmp_path / "one", 5, math.nan)
    assert info.fault == "loss" and "No space left on device" in info.capsule and not (tmp_path / "one").exists()
    assert update("", 0, 1.0).fault == ""


def test_weights_that_are_not_finite_are_named_and_make_no_capsule(worker: ValueWorker, update: Update, tmp_path: Path) -> None:
    with torch.no_grad():
        worker._engine.module.model.score.weight[0, 3] = math.nan
    info = update(tmp_path / "one", 5, 1.0)
    assert info.fault == "loss" and info.unsound == "model.score.weight" and info.capsule == "" and not (tmp_path / "one").exists()
