"""A run goes on with other ranks, another ZeRO stage or another launcher: its metrics continue as if nothing had happened, to 1e-4."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_dist.cli.main import main
from rlhf_dist.cli.paths import with_absolute_paths
from rlhf_dist.cli.programs import PPOProgram
from rlhf_dist.cli.ray_launch import run_under_ray
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.runs.metrics import read_metrics
from rlhf_dist.runs.rollout_log import read_rollouts

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]
HERE = Path(__file__).parent
LAUNCHED, MORTAL = HERE / "programs" / "launched.py", HERE.parent / "laws" / "programs" / "mortal.py"
STEPS, STOP = 4, 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_run: Callable[[Path], dict[str, Any]], run_ranks: Any, ray_session: None) -> Path:
    """The folder of all runs: `plain` in one go, the others begun in one home, stopped after two steps and ended in another."""
    root = tmp_path_factory.mktemp("resume_homes")
    stages = {number: root / f"zero{number}.json" for number in (0, 2, 3)}
    for number, path in stages.items():
        path.write_text(json.dumps({"zero_optimization": {"stage": number}}))

    def values(name: str, stage: int, launcher: str = "spmd") -> dict[str, Any]:
        made = tiny_run(root)
        made["run"] |= {"name": name, "output_dir": str(root), "steps": STEPS, "resume": "auto"}
        for role in ("policy", "value"):
            made[role] |= {"deepspeed": str(stages[stage]), "ranks": 2, "cpus_per_rank": 0.5}
        made["rollout"] |= {"max_staleness": 1}
        made["algorithm"]["kl"] = {"adaptive": True}
        return made | {"placement": {"launcher": launcher}, "evaluation": {"every": 2}}

    def file(name: str, stage: int) -> str:
        path = root / f"{name}_{stage}.yaml"
        path.write_text(yaml.safe_dump(values(name, stage)))
        return str(path)

    def begun(name: str, stage: int, ranks: int) -> None:
        job = {"stage": "ppo", "values": values(name, stage), "stop": STOP}
        (root / f"{name}.jobs").write_text(json.dumps([job]))
        run_ranks(MORTAL, ranks, str(root / f"{name}.jobs"))
        assert [line["step"] for line in read_metrics(root / name / "metrics.jsonl")] == [0, 1, 2]

    main(["ppo", "--config", file("plain", 0)])
    begun("one_to_two", 0, 1)
    shutil.copytree(root / "one_to_two", root / "to_ray")
    run_ranks(LAUNCHED, 2, "ppo", "--config", file("one_to_two", 3))
    begun("two_to_one", 2, 2)
    main(["ppo", "--config", file("two_to_one", 0)])
    run_under_ray(PPOProgram(with_absolute_paths(PPOConfig.model_validate(values("to_ray", 2, "ray")))))
    return root


@pytest.mark.parametrize("name", ["one_to_two", "two_to_one", "to_ray"])
def test_the_metrics_continue_to_1e_4(runs: Path, name: str) -> None:
    """From 1 rank to 2 under ZeRO 3, from 2 ranks under ZeRO 2 to 1, from 1 process to 2 of Ray's actors under ZeRO 2; one step stale."""
    one, other = read_metrics(runs / "plain" / "metrics.jsonl"), read_metrics(runs / name / "metrics.jsonl")
    assert [line["step"] for line in other] == list(range(STEPS + 1))
    for a, b in zip(one, other, strict=True):
        names = {key for key in a if not key.startswith(("perf/", "preflight/", "coordinator/", "weight_sync/")) and key != "time"}
        assert names <= set(b) and (a["step"] == 0 or {"objective/kl", "loss/value_avg", "policy/grad_norm"} <= names)
        for key in names:
            assert math.isclose(a[key], b[key], rel_tol=1e-4, abs_tol=1e-4), f"step {a['step']}, {key}: {a[key]} and {b[key]}"


@pytest.mark.parametrize("name", ["one_to_two", "two_to_one", "to_ray"])
def test_the_samples_are_the_same(runs: Path, name: str) -> None:
    for step in range(1, STEPS + 1):
        tables = [read_rollouts(runs / run / "rollouts" / f"step_{step:06d}.parquet") for run in ("plain", name)]
        wanted = ("prompt_id", "sample_index", "completion", "policy_version")
        rows = [sorted(zip(*(table.column(key).to_pylist() for key in wanted), strict=True)) for table in tables]
        assert rows[0] == rows[1] and len(rows[0]) == 16
