"""Gaps are computed as said; the script whole where RLHF_DIST_VLLM_PYTHON names a Python that has vLLM."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import mismatch
import pytest
import torch
from mismatch import Sampled, Setting

from rlhf_dist.rollout.native import RolloutRow

VLLM = os.environ.get("RLHF_DIST_VLLM_PYTHON", "")
SETTING = Setting("", temperature=0.7, top_p=0.6, new_tokens=5, samples=1, learning_rate=1e-2)


@pytest.fixture
def policy(tiny_model: Path) -> Any:
    return mismatch.load(str(tiny_model), torch.float32)


def sampled(policy: Any) -> Sampled:
    """Random tokens with the log-probs of the trainer itself: no gap."""
    draw = torch.Generator().manual_seed(0)
    rows = [RolloutRow((1, 5, 9)[: number + 1], number, 0) for number in range(3)]
    tokens = [tuple(torch.randint(3, 60, (5,), generator=draw).tolist()) for _ in rows]
    blank = Sampled(rows, tokens, [(0.0,) * 5] * 3)
    return Sampled(rows, tokens, [tuple(row.tolist()) for row in mismatch.score(policy, blank, SETTING.temperature)])


def test_a_gap_is_the_samplers_log_prob_minus_the_trainers() -> None:
    both = Sampled([], [(1, 2), (3, 4)], [(-1.0, -2.0), (-3.0, -4.0)])
    found = mismatch.gap(both, [torch.tensor([-1.0, -2.5]), torch.tensor([-3.0, -3.5])])
    assert (found.mean, found.mean_absolute, found.largest, found.tokens) == (0.0, 0.25, 0.5, 4)
    assert found.ratio == pytest.approx((abs(math.exp(-0.5) - 1) + abs(math.exp(0.5) - 1)) / 4)


def test_temperature_and_one_step_open_a_gap_that_the_right_trainer_closes(policy: Any) -> None:
    made = sampled(policy)
    assert mismatch.gap(made, mismatch.score(policy, made, SETTING.temperature)).largest < 1e-6
    assert mismatch.gap(made, mismatch.score(policy, made, 1.0)).mean_absolute > 0.05
    mismatch.step(policy, made, SETTING)
    assert mismatch.gap(made, mismatch.score(policy, made, SETTING.temperature)).mean_absolute > 0.01


def test_the_kept_mass_is_that_of_the_tokens_that_top_p_keeps(policy: Any) -> None:
    made = sampled(policy)
    masses = torch.stack(mismatch.kept_mass(policy, made, SETTING))
    assert masses.min() >= SETTING.top_p and masses.max() < 1
    with torch.no_grad():
        logits_V = policy(torch.tensor([made.rows[0].prompt_tokens])).logits[0, -1]
    probs_V = (logits_V / SETTING.temperature).softmax(-1).sort(descending=True).values
    kept = int((probs_V.cumsum(0) < SETTING.top_p).sum()) + 1
    assert masses[0, 0].item() == pytest.approx(probs_V[:kept].sum().item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(not VLLM, reason="RLHF_DIST_VLLM_PYTHON names no interpreter with vLLM")
def test_every_cause_is_measured_and_accounted_for(shared: Path, tmp_path: Path) -> None:
    model = shared / "models" / "stories15M"
    options = ["--model", str(model), "--new-tokens", "8", "--samples", "1", "--results", str(tmp_path)]
    subprocess.run([VLLM, mismatch.__file__, *options], check=True, capture_output=True)
    report = json.loads((tmp_path / "mismatch_stories15M_cpu.json").read_text())
    assert "vllm" in report["manifest"]["versions"] and report["manifest"]["workload"]["new_tokens"] == 8
    assert report["nothing"]["mean_absolute"] < 1e-4 < report["staleness"]["mean_absolute"]
    for cause in ("temperature", "kept mass"):
        assert report[f"{cause}, accounted for"]["mean_absolute"] < 1e-3 < report[cause]["mean_absolute"]
