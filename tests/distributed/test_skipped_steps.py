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


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [3])
def test_both_ranks_skip_and_one_process_replays(stage: int, ppo_values: dict[str, Any], run_ranks: Any, tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    values = ppo_values | {"policy": ppo_values["policy"] | {"deepspeed": str(tmp_path / "zero.json"), "microbatch_tokens": 60}}
    values["algorithm"] = {"estimator": "rloo", "epochs": 2, "minibatches": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    run_ranks(PROGRAM, 2, str(tmp_path / "run.yaml"))
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
