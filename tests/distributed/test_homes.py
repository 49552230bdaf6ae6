"""One program, three homes: two ranks for every role under Ray, the same under a launcher, and one plain process, give the same run."""

from __future__ import annotations

import json
import math
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

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
PROGRAM = Path(__file__).parent / "programs" / "launched.py"
STEPS = 3


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, prompts_file: Path, reward_file: Path, run_ranks: Any, ray_session: None
) -> dict[str, Path]:
    """The folders of the three runs: ZeRO 2 under policy and value, ZeRO 3 under the reference."""
    root = tmp_path_factory.mktemp("homes")
    stages = {number: root / f"zero{number}.json" for number in (2, 3)}
    for number, path in stages.items():
        path.write_text(json.dumps({"zero_optimization": {"stage": number}}))
    two = {"ranks": 2, "cpus_per_rank": 0.5}
    values: dict[str, Any] = {
        "run": {"output_dir": str(root), "steps": STEPS, "seed": 3},
        "data": {"train": str(prompts_file), "eval_fraction": 0.25, "max_prompt_tokens": 16},
        "policy": {"model": str(tiny_model), "deepspeed": str(stages[2]), "optim": {"lr": 1e-3}, **two},
        "value": {"deepspeed": str(stages[2]), "optim": {"lr": 1e-3}, **two},
        "reference": {"deepspeed": str(stages[3]), **two},
        "reward": {"sources": [{"name": "even", "kind": "function", "path": f"{reward_file}:even"}], **two},
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 2, "max_new_tokens": 12, "slots": 8},
        "algorithm": {"epochs": 2, "minibatches": 2},
        "evaluation": {"every": 2, "samples_per_prompt": 2},
    }

    def file(name: str, launcher: str) -> Path:
        values["run"]["name"], values["placement"] = name, {"launcher": launcher}
        path = root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    run_ranks(PROGRAM, 2, "ppo", "--config", str(file("launched", "spmd")))
    main(["ppo", "--config", str(file("plain", "spmd"))])
    config = PPOConfig.model_validate(yaml.safe_load(file("ray", "ray").read_text()))
    run_under_ray(PPOProgram(with_absolute_paths(config)))
    return {name: root / name for name in ("launched", "plain", "ray")}


def assert_same_metrics(one: Path, other: Path, tolerance: float) -> None:
    """Every metric but times, bytes and the (tiny, partition-dependent) preflight gaps."""
    first, second = read_metrics(one / "metrics.jsonl"), read_metrics(other / "metrics.jsonl")
    assert len(first) == len(second) == STEPS + 1
    for a, b in zip(first, second, strict=True):
        names = {name for name in a if not name.startswith(("perf/", "preflight/", "coordinator/", "weight_sync/")) and name != "time"}
        assert names <= set(b) and (a["step"] == 0 or {"objective/kl", "loss/value_avg", "policy/grad_norm"} <= names)
        for name in names:
            assert math.isclose(a[name], b[name], rel_tol=tolerance, abs_tol=tolerance), (
                f"step {a['step']}, {name}: {a[name]} and {b[name]}"
            )


def test_ray_and_the_launcher_agree_to_1e_6(runs: dict[str, Path]) -> None:
    assert_same_metrics(runs["ray"], runs["launched"], 1e-6)


def test_one_plain_process_agrees_to_1e_4(runs: dict[str, Path]) -> None:
    assert_same_metrics(runs["ray"], runs["plain"], 1e-4)


def test_the_same_completions_on_one_and_two_ranks(runs: dict[str, Path]) -> None:
    """Law 9 over rank counts and homes; step 1 comes before any update, later steps show that the updates agree too."""
    for step in range(1, STEPS + 1):
        tables = [read_rollouts(run / "rollouts" / f"step_{step:06d}.parquet") for run in runs.values()]
        rows = [
            list(zip(*(table.column(name).to_pylist() for name in ("prompt_id", "sample_index", "completion")), strict=True))
            for table in tables
        ]
        assert rows[0] == rows[1] == rows[2]
        assert len(rows[0]) == 16 and len({row[:2] for row in rows[0]}) == 16


def test_every_sample_knows_its_policy_version(runs: dict[str, Path]) -> None:
    for step in range(1, STEPS + 1):
        table = read_rollouts(runs["ray"] / "rollouts" / f"step_{step:06d}.parquet")
        assert set(table.column("policy_version").to_pylist()) == {step - 1}


def test_only_one_rank_wrote(runs: dict[str, Path]) -> None:
    assert len(list((runs["launched"] / "tensorboard").iterdir())) == 1
    assert (runs["launched"] / "summary.json").is_file() and (runs["ray"] / "export" / "value" / "model.safetensors").is_file()
