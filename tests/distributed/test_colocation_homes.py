"""Engines that take turns over several ranks, under Ray and under a launcher: each run is the one whose engines stay, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from rlhf_dist.cli.paths import with_absolute_paths
from rlhf_dist.cli.programs import PPOProgram
from rlhf_dist.cli.ray_launch import run_under_ray
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.runs.metrics import read_metrics
from rlhf_dist.runs.rollout_log import read_rollouts

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
PROGRAM = Path(__file__).parent / "programs" / "launched.py"
TIMED = ("perf/", "time", "coordinator/", "weight_sync/seconds", "offload/")
WAYS = ("none", "idle")
Values = dict[str, Any]


@pytest.fixture
def values(tmp_path: Path, tiny_model: Path, prompts_file: Path, reward_file: Path) -> Values:
    """The policy on two ranks. The folder has DeepSpeed files."""
    for stage in (2, 3):
        (tmp_path / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return {
        "run": {"output_dir": str(tmp_path), "steps": 2, "seed": 3},
        "data": {"train": str(prompts_file), "max_prompt_tokens": 16},
        "policy": {"model": str(tiny_model), "optim": {"lr": 1e-3}, "ranks": 2, "cpus_per_rank": 0.5},
        "value": {"optim": {"lr": 1e-3}, "cpus_per_rank": 0.5},
        "reward": {"sources": [{"name": "even", "kind": "function", "path": f"{reward_file}:even"}], "cpus_per_rank": 0.5},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 12, "slots": 8},
        "algorithm": {"epochs": 1, "minibatches": 2},
    }


def assert_same_run(root: Path) -> None:
    """Metrics but for times, samples, final weights."""
    none, idle = (root / way for way in WAYS)
    lines = [read_metrics(run / "metrics.jsonl") for run in (none, idle)]
    for first, second in zip(*lines, strict=True):
        assert {name for name in first if first[name] != second[name] and not name.startswith(TIMED)} == set()
        assert second["offload/bytes"] > 100_000 and second["offload/seconds"] > 0
    for step in (1, 2):
        samples = [read_rollouts(run / "rollouts" / f"step_{step:06d}.parquet") for run in (none, idle)]
        assert samples[0].equals(samples[1])
    for role in ("policy", "value"):
        weights = [load_file(run / "export" / role / "model.safetensors") for run in (none, idle)]
        assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


@pytest.mark.long
def test_under_ray_with_an_adapter_and_a_rollout_group(values: Values, tmp_path: Path, ray_session: None) -> None:
    """The policy under ZeRO 2 in fp32 with LoRA; the value model without ZeRO, in bf16."""
    values["policy"] |= {"deepspeed": str(tmp_path / "zero2.json"), "lora": {"r": 4}}
    values["value"]["dtype"] = "bf16"
    values["rollout"] |= {"ranks": 1, "cpus_per_rank": 0.5}
    for way in WAYS:
        values["run"]["name"], values["placement"] = way, {"offload": way}
        run_under_ray(PPOProgram(with_absolute_paths(PPOConfig.model_validate(values))))
    assert_same_run(tmp_path)


def test_under_a_launcher_where_a_copy_samples(values: Values, tmp_path: Path, run_ranks: Any) -> None:
    """Each engine on both ranks: the policy under ZeRO 3 in bf16, the value model under ZeRO 2 in fp32."""
    values["policy"] |= {"deepspeed": str(tmp_path / "zero3.json"), "dtype": "bf16"}
    values["value"]["deepspeed"] = str(tmp_path / "zero2.json")
    for way in WAYS:
        values["run"]["name"], values["placement"] = way, {"launcher": "spmd", "offload": way}
        path = tmp_path / f"{way}.yaml"
        path.write_text(yaml.safe_dump(values))
        run_ranks(PROGRAM, 2, "ppo", "--config", str(path))
    assert_same_run(tmp_path)
