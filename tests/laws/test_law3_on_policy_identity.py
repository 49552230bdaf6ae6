"""Law 3: on policy the ratio is 1, nothing is clipped, and KL to the initial policy is 0; in fp32 and in bf16, checked by every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_dist.cli.main import main
from rlhf_dist.config.errors import UserError
from rlhf_dist.coordinator.preflight import check_first_minibatch, check_gaps
from rlhf_dist.runs.metrics import read_metrics


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_starts_on_policy(ppo_values: dict[str, Any], tmp_path: Path, dtype: str) -> None:
    for role in ("policy", "value", "reference"):
        ppo_values.setdefault(role, {})["dtype"] = dtype
    ppo_values["run"]["steps"] = 1
    ppo_values["algorithm"] = {"epochs": 1, "minibatches": 1}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(ppo_values))
    main(["ppo", "--config", str(config)])
    probe, first = read_metrics(tmp_path / "runs" / "test" / "metrics.jsonl")
    statistic, tolerance = ("max", 1e-5) if dtype == "fp32" else ("mean", 5e-3)
    assert probe[f"preflight/ratio/{statistic}"] <= tolerance
    assert probe[f"preflight/reference/{statistic}"] <= tolerance
    assert first["policy/clipfrac_avg"] <= (0 if dtype == "fp32" else 1e-3)
    assert abs(first["val/ratio"] - 1) <= tolerance
    assert abs(first["objective/kl"]) <= (1e-5 if dtype == "fp32" else 12 * 5e-3), "12 tokens a sequence"


def test_a_breach_names_its_likely_causes() -> None:
    fine = {f"{name}/{statistic}": 0.0 for name in ("ratio", "sampler", "reference") for statistic in ("mean", "max")}
    check_gaps(fine, "fp32", same_reference=True)
    for name, cause in (("ratio", "dropout"), ("sampler", "other weights"), ("reference", "adapter")):
        with pytest.raises(UserError, match="likely causes") as caught:
            check_gaps(fine | {f"{name}/mean": 1e-3}, "fp32", same_reference=True)
        assert cause in caught.value.fix
    check_gaps(fine | {"reference/max": 1.0}, "fp32", same_reference=False)
    with pytest.raises(UserError):
        check_gaps(fine | {"ratio/max": float("nan")}, "fp32", same_reference=True)


def test_the_first_minibatch_of_every_step_is_held_to_it() -> None:
    fine = {"val/ratio_max_deviation": 1e-7, "val/ratio_mean_deviation": 1e-8, "val/ratio": 1.0, "policy/clipfrac_avg": 0.0}
    check_first_minibatch(fine, "fp32", 0)
    check_first_minibatch(fine | {"val/ratio_max_deviation": 0.1}, "bf16", 0)
    with pytest.raises(UserError, match="step 4"):
        check_first_minibatch(fine | {"val/ratio_mean_deviation": 1e-4}, "fp32", 3)
    with pytest.raises(UserError, match="clip fraction"):
        check_first_minibatch(fine | {"policy/clipfrac_avg": 0.01}, "bf16", 3)
