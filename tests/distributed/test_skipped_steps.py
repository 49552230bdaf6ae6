"""Two ranks, one of which alone sees a loss that is not finite, its gradient being finite: both skip, and one process replays the step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_dist.runs.capsule import read_capsule
from rlhf_dist.runs.metrics import read_metrics
from rlhf_dist.workers.replay import replay

PROGRAM = Path(__file__).parent / "programs" / "skipped.py"


pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("stage", [3])
def test_both_ranks_skip_and_one_process_replays(stage: int, ppo_values: dict[str, Any], run_ranks: Any, tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    values = ppo_values | {"policy": ppo_values["policy"] | {"deepspeed": str(tmp_path / "zero.json"), "microbatch_tokens": 60}}
    values["algorithm"] = {"estimator": "rloo", "epochs": 2, "minibatches": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    run_ranks(PROGRAM, 2, "ppo", "5", str(tmp_path / "run.yaml"))  # the first of the second PPO step
    root = Path(values["run"]["output_dir"]) / "test"
    lines = read_metrics(root / "metrics.jsonl")
    assert [line["policy/skipped_steps"] for line in lines[1:]] == [0.0, 0.25] and lines[2]["sentinels/skipped_steps"] == 1.0
    assert all(math.isfinite(value) for line in lines for value in line.values())
    capsule = read_capsule(root / "capsules" / "step_000002_policy_01")
    assert capsule.facts.fault == "loss" and len(capsule.parts) == 2 and all(part.microbatches for part in capsule.parts)
    assert all(map(math.isfinite, capsule.parts[0].losses)) and math.isinf(capsule.parts[1].losses[0])
    found = replay(capsule)
    for each in found.microbatches:
        assert math.isinf(each.recorded) or abs(each.now - each.recorded) <= 1e-6 * each.size
    assert not found.reproduced and sum(math.isinf(each.recorded) for each in found.microbatches) == 1, "nothing spoils the loss here"
    assert sum(len(part.losses) for part in capsule.parts) == len(found.microbatches) >= 4


def test_a_supervised_stage_does_the_same(tiny_model: Path, run_ranks: Any, tmp_path: Path) -> None:
    """Under ZeRO 3, in its second optimizer step of three."""
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    rows = [{"prompt": f"w{n} w3", "chosen": f" w{n + 1}" * (1 + n % 4), "rejected": f" w{n + 30}"} for n in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"model": str(tiny_model), "deepspeed": str(tmp_path / "zero.json"), "microbatch_tokens": 32, "optim": {"lr": 3e-3}}
    data = {"train": str(tmp_path / "pairs.jsonl"), "max_tokens": 32}
    values = {"run": {"name": "dpo", "output_dir": str(tmp_path)}, "data": data, "model": model}
    values |= {"training": {"batch_size": 8}, "placement": {"launcher": "spmd"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    run_ranks(PROGRAM, 2, "dpo", "2", str(tmp_path / "run.yaml"))
    assert [line["skipped_steps"] for line in read_metrics(tmp_path / "dpo" / "metrics.jsonl")] == [0.0, 1.0, 0.0]
    (folder,) = (tmp_path / "dpo" / "capsules").iterdir()
    capsule = read_capsule(folder)
    assert folder.name == "step_000002_model_01" and capsule.facts.fault == "loss" and len(capsule.parts) == 2
    assert all(map(math.isfinite, capsule.parts[0].losses)) and math.isinf(capsule.parts[1].losses[0])
    assert len({each.number for rank in range(2) for each in capsule.rows(rank)}) == 8, "every row of the step, once"
    found = replay(capsule)
    assert len(found.samples) == 8 and len(found.microbatches) == sum(len(part.losses) for part in capsule.parts) >= 4
    for each in found.microbatches:
        assert math.isinf(each.recorded) or abs(each.now - each.recorded) <= 1e-6 * each.size
    assert not found.reproduced and sum(math.isinf(each.recorded) for each in found.microbatches) == 1, "nothing spoils the loss here"
    assert abs(found.loss - math.log(2)) > 1e-4, "the weights are those after a step"
