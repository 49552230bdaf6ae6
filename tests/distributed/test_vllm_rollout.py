"""A whole run whose samples come from vLLM, in an actor in another environment, with weights pushed after every step.

RLHF_DIST_VLLM_PYTHON names that environment's interpreter (bash launch/vllm_env.sh makes one: .venv-vllm/bin/python).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PYTHON = os.environ.get("RLHF_DIST_VLLM_PYTHON", "")
STEPS = 3

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="RLHF_DIST_VLLM_PYTHON names no interpreter with vLLM"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, wide_model: Path) -> Path:
    """As `wide_model`, with heads as wide as vLLM's kernels want them."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("vllm_policy")
    config = AutoConfig.from_pretrained(wide_model, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(wide_model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("transport", ["ipc", "broadcast", "object_store"])
def test_vllm_samples_from_the_weights_of_every_step(
    transport: str, model: Path, tiny_run: Callable[[Path], dict[str, Any]], tmp_path: Path, ray_session: None
) -> None:
    """Its log-probs stay those of the policy while the policy moves far: law 3 holds with them as the old ones."""
    from rlhf_dist.cli.paths import with_absolute_paths
    from rlhf_dist.cli.programs import PPOProgram
    from rlhf_dist.cli.ray_launch import run_under_ray
    from rlhf_dist.config.ppo import PPOConfig
    from rlhf_dist.runs.metrics import read_metrics

    values = tiny_run(tmp_path)
    values["run"]["steps"] = STEPS
    values["placement"] = {"launcher": "ray"}
    values["policy"] |= {"model": str(model), "cpus_per_rank": 0.5, "optim": {"lr": 0.01}}
    values["reference"] = {"cpus_per_rank": 0.5}
    values["reward"] |= {"cpus_per_rank": 0.5}
    values["algorithm"] |= {"estimator": "reinforce"}
    values["rollout"] |= {"engine": "vllm", "ranks": 1, "cpus_per_rank": 0.5, "python": PYTHON, "weight_sync": transport}
    root = run_under_ray(PPOProgram(with_absolute_paths(PPOConfig.model_validate(values))))
    start, *steps = read_metrics(root / "metrics.jsonl")
    assert start["preflight/sampler/mean"] < 1e-4
    assert all(line["val/rollout_logprob_gap"] < 1e-4 for line in steps)
    assert steps[-1]["objective/kl"] > 0.1, "the policy has moved, or the test shows nothing"
    assert len({line["weight_sync/checksum"] for line in steps}) == STEPS
