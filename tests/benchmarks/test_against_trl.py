"""Our side of the comparison with TRL whole, on the smallest model; both sides where RLHF_DIST_TRL_PYTHON names a Python that has TRL."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import against_trl
import pytest
from likeness import SAMPLES, digest
from turns import ours
from workload import Rounds, Shape, make_rows, save_models, write_job

pytestmark = pytest.mark.slow
PEER = os.environ.get("RLHF_DIST_TRL_PYTHON", "")
TINY, ROWS = Shape(64, 2, 300), make_rows(8, 16, vocabulary=300)


def test_our_side_reports_what_it_did(tmp_path: Path) -> None:
    workload: dict[str, Any] = {"dtype": "float32", "minibatches": 4, "overrides": ["policy.packing=true"]}
    job = write_job(tmp_path, save_models(tmp_path, TINY), workload, ROWS, rounds=Rounds(1, 1), threads=1)
    side = ours(job, "cpu")
    try:
        facts = side.manifest
        done = []
        for _ in range(2):
            line = side.iteration()
            done.append(side.read("DID"))
    finally:
        side.close()
    assert (facts.warm_up, facts.repeats, facts.settings["packing"]) == (1, 1, {"policy": True, "value": False})
    models = facts.workload["models"]
    assert set(models) == {"policy", "reference", "value", "reward"} and models["policy"] == models["reference"]
    assert models["value"] == models["reward"] != models["policy"], "the value model begins as the reward model"
    assert (models["policy"]["hidden"], models["policy"]["words"], models["policy"]["dtype"]) == (64, 300, "float32")
    assert line["seconds"] > line["generate"] > 0
    for did in (each["did"] for each in done):
        assert did["rows"] == 8 and did["prompts"] == digest(ROWS.prompts)
        pairs = zip(ROWS.prompts, ROWS.lengths, strict=True)
        assert did["completion_lengths"] == digest((*prompt, length) for prompt, length in pairs)
        assert did["trained_tokens"] == {"policy": sum(ROWS.lengths), "value": sum(ROWS.lengths)}
        assert did["optimizer_steps"] == {"policy": 4, "value": 4} and did["lr"]["policy"] == [1e-6]
        assert len(set(did["minibatches"]["policy"])) == 4
    left = json.loads((tmp_path / SAMPLES).read_text())
    assert digest(left["order"]) == digest(ROWS.prompts) and done[0]["did"]["minibatches"] != done[1]["did"]["minibatches"]
    assert done[0]["result"]["policy_gradient"] > 0 and abs(done[0]["result"]["kl"]) < 1e-4


@pytest.mark.skipif(not PEER, reason="RLHF_DIST_TRL_PYTHON names no interpreter with TRL")
@pytest.mark.parametrize("dtype", ["float32"])
def test_both_sides_do_the_same_and_are_compared(dtype: str, tmp_path: Path) -> None:
    against_trl.main(
        Path(PEER), dtype, rows=16, limit=16, repeats=1, warm_up=1, threads=1, hidden=64, layers=2, vocabulary=4000, results=tmp_path,
        overrides=["algorithm.value_clip=0.2"],
    )  # fmt: skip
    (path,) = tmp_path.glob("*.json")
    assert path.stem == f"against_trl_ragged_{dtype}_r16_t1_algorithm.value_clip=0.2"
    report = json.loads(path.read_text())
    assert report["ratio"] > 0 and len(report["done"]) == 2
    assert "trl" in report["TRL"]["versions"] and report["TRL"]["repeats"] == report["TRL"]["warm_up"] == 1
    assert report["done"][0]["compared"]
    mine, theirs = (report["done"][0][side]["result"] for side in ("ours", "TRL"))
    assert mine["surprise"] == pytest.approx(theirs["surprise"], rel=1e-3)
    assert mine["policy_gradient"] == pytest.approx(theirs["policy_gradient"], rel=0.02)


@pytest.mark.skipif(not PEER, reason="RLHF_DIST_TRL_PYTHON names no interpreter with TRL")
def test_a_config_that_does_other_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be compared: workload"):
        against_trl.main(
            Path(PEER), rows=8, limit=16, repeats=1, warm_up=1, threads=1, hidden=64, layers=2, vocabulary=300, results=tmp_path,
            overrides=["algorithm.epochs=2"],
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
