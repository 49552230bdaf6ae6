"""Law 2: one batch gives one gradient, over microbatch splits × data-parallel sizes × ZeRO stages 0-3 × padded or packed.

Poison stands in every padded slot. The Ray and the deepspeed launcher are compared in tests/distributed/test_homes.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_dist.runs.metrics import read_metrics

PROGRAM = Path(__file__).parents[1] / "distributed" / "programs" / "gradients.py"


@pytest.mark.distributed
@pytest.mark.slow
def test_one_batch_gives_one_gradient(run_ranks: Any, tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    _calm(tiny_model, model)
    found: dict[str, torch.Tensor] = {}
    norms: dict[str, float] = {}
    for world_size in (1, 2):
        out = tmp_path / f"world{world_size}.pt"
        norms |= run_ranks(PROGRAM, world_size, str(model), str(out))[0]
        found |= torch.load(out)
    assert len(found) == 4 * 2 * 4 * 4 * 2, "four losses, padded and packed, four stages, four splits, two world sizes"
    for role in ("policy", "value", "dpo", "reward"):
        expected = found[f"{role} zero0 world1 microbatches1"]
        assert bool(expected.isfinite().all()) and float(expected.norm()) > 0.01
        for key, gradient in found.items():
            if key.startswith(role):
                assert float((gradient - expected).norm() / expected.norm()) < 1e-6, key
                assert math.isclose(norms[key], float(expected.norm()), rel_tol=1e-5), f"{key}: reported norm"


def test_a_packed_run_is_the_padded_one(ppo_values: dict[str, Any], tiny_scorer: Path, rlhf_dist_ppo: Callable[..., Path]) -> None:
    """Two whole steps with policy, reference, value and a model reward, every engine packed: the same numbers up to rounding."""
    ppo_values["reward"]["sources"] = [{"name": "judge", "kind": "model", "model": str(tiny_scorer)}]
    ppo_values["data"].pop("eval_fraction")
    lines = []
    for packing in (False, True):
        values = ppo_values | {"run": ppo_values["run"] | {"name": f"packing_{packing}"}}
        sections = ("policy", "reference", "value", "reward")
        run = rlhf_dist_ppo(values, *(f"{section}.packing={packing}" for section in sections))
        lines.append(read_metrics(run / "metrics.jsonl")[1:])
    speeds = {"policy_score", "reference_score", "value_score", "judge_score", "policy_update", "value_update"}
    for padded, packed in zip(*lines, strict=True):
        assert padded.keys() == packed.keys() and {f"perf/{name}_tflops" for name in speeds} <= packed.keys()
        for name in ("rewards/judge", "objective/kl", "loss/policy_avg", "loss/value_avg", "policy/grad_norm", "value/grad_norm"):
            assert packed[name] == pytest.approx(padded[name], rel=1e-3, abs=1e-4), name


def _calm(source: Path, target: Path) -> None:
    """The tiny model with small weights: the large ones that make its samples lively multiply rounding too."""
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(0.3)
    model.save_pretrained(target)
