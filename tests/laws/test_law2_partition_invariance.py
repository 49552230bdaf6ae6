"""Law 2: one batch gives one gradient, over microbatch splits × data-parallel sizes × ZeRO stages 0-3 × padded or packed.

Poison stands in every padded slot. The Ray and the deepspeed launcher are compared in tests/distributed/test_homes.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

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
    assert len(found) == 6 * 4 * 4 * 2, "four losses, two of them also packed, four stages, four splits, two world sizes"
    for role in ("policy", "value", "dpo", "reward"):
        expected = found[f"{role} zero0 world1 microbatches1"]
        assert bool(expected.isfinite().all()) and float(expected.norm()) > 0.01
        for key, gradient in found.items():
            if key.startswith(role):
                assert float((gradient - expected).norm() / expected.norm()) < 1e-6, key
                assert math.isclose(norms[key], float(expected.norm()), rel_tol=1e-5), f"{key}: reported norm"


def _calm(source: Path, target: Path) -> None:
    """The tiny model with small weights: the large ones that make its samples lively multiply rounding too."""
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(0.3)
    model.save_pretrained(target)
