"""Each script once, from end to end, on the smallest model: it prints its table, and its JSON holds figures and a manifest."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ceilings
import memory
import pytest
import roofline
import scaling
import throughput
import training_step
import yaml
from options import Options
from workload import Shape

pytestmark = pytest.mark.slow
TINY: dict[str, Any] = {"hidden": 64, "layers": 2, "threads": 1}


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings of sizes that take no time."""
    monkeypatch.setitem(ceilings.SQUARES, "cpu", (128,))
    monkeypatch.setitem(ceilings.COPIES_MIB, "cpu", (8,))


def written(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    report: dict[str, Any] = json.loads(path.read_text())
    facts = report["manifest"]
    assert facts["versions"]["torch"] and facts["machine"] and facts["workload"]
    return report


class CountingSide:
    """In the place of a process of our loop (test_roofline has a real one): an iteration takes a second a token."""

    manifest = None

    def __init__(self, job: Path, device: str) -> None:
        given = json.loads(job.read_text())
        self._tokens = sum(given["lengths"]) + sum(map(len, given["prompts"]))

    def iteration(self) -> dict[str, float]:
        return {"seconds": float(self._tokens)}

    def close(self) -> None:
        """Nothing."""


def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "ours", CountingSide)
    scaling.main(Options(4, 8, repeats=1, overrides=("policy.packing=true",), threads=1, shape=Shape(64, 2, 100), results=tmp_path))
    report = written(tmp_path)
    assert next(tmp_path.glob("*.json")).stem.endswith("_t1_policy.packing=true")
    batch, length = (report["growth"][name] for name in ("batch × 2", "length × 2"))
    assert batch["measured"]["median"] == length["measured"]["median"] == 2
    assert batch["predicted"] == pytest.approx(2) and 2 < length["predicted"] < 3
    assert batch["ratio"] == pytest.approx(1) and length["ratio"] == pytest.approx(2 / length["predicted"])


def test_roofline(tmp_path: Path) -> None:
    given = Options(4, 8, "bfloat16", repeats=1, warm_up=0, threads=1, shape=Shape(64, 2, 100), results=tmp_path)
    roofline.main(dataclasses.replace(given, overrides=("algorithm.epochs=2",)))
    report = written(tmp_path)
    assert all(0 < report["eta"][phase]["median"] < 1 for phase in ("generate", "score", "train", "seconds"))
    assert report["least"]["train"] > 4 * report["least"]["score"] / 3  # two epochs of three forwards, beside three forwards of scoring
    assert report["ceilings"]["flops"] == max(rate for name, rate in report["rates"].items() if name.startswith("matrix"))


def test_training_step(tmp_path: Path) -> None:
    training_step.main(
        "float32", "0,3", "plain,packed", "ragged", rows=4, minibatches=2, limit=8,
        microbatch_tokens=64, rows_per_forward=4, repeats=1, warm_up=0,
        ranks=1, vocabulary=100, results=tmp_path, job="", **TINY,
    )  # fmt: skip
    found = written(tmp_path)["variants"]
    assert list(found) == [f"float32, ZeRO {stage}, ragged, {layout}" for stage, layout in ((0, "plain"), (0, "packed"), (3, "packed"))]
    plain, packed, _ = found.values()
    assert packed["faster_than"]["plain"]["median"] == pytest.approx(plain["seconds"]["median"] / packed["seconds"]["median"])
    assert plain["rows_per_forward"] == [1] * 4, "a budget of 64 slots holds one row of the rectangle"
    assert all(0 < each["mfu"] < 1 and each["trained_tokens_per_second"] > 0 for each in found.values())


@pytest.mark.long
def test_memory_of_a_streamed_head_is_not_that_of_the_logits(tmp_path: Path) -> None:
    memory.main(
        "head", "96000", rows=4, limit=48, dtype="fp32", repeats=1, results=tmp_path, job="", **TINY
    )  # fmt: skip
    found = written(tmp_path)["mib"]
    plain, streamed = (found[f"head, vocabulary 96000, {name}"]["score"]["median"] for name in ("plain", "streamed"))
    assert plain > 1.5 * streamed  # 4 × 49 logits of 96000 words are 72 MiB; a block of 8192 words is 6 MiB, and a few such are held
    assert all(each["process"]["median"] > each["step"]["median"] for each in found.values())


def test_throughput(tmp_path: Path, ppo_values: dict[str, Any]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(ppo_values))
    throughput.main(config, ["rollout.max_new_tokens=6"], steps=2, warm_up=1, results=tmp_path / "results")
    report = written(tmp_path / "results")
    assert len(report["measured"]) == 2 and report["manifest"]["warm_up"] == 1
    assert report["manifest"]["workload"]["config"]["rollout"]["max_new_tokens"] == 6
    assert {"generate", "score", "train", "step"} <= set(report["seconds"])
    assert 0 < report["coordinator_share"]["median"] < 0.9
    assert 0 < report["coordinator_seconds"]["median"] < report["wall_seconds"]["high"]
    assert next((tmp_path / "results").glob("*.json")).stem.endswith("_rollout.max_new_tokens=6")
    # One plain process: what workers do and what the coordinator does add up to the iteration.
    assert report["wall_seconds"]["median"] >= 0.9 * report["seconds"]["step"]["median"]
