"""DPO on two ranks, under ZeRO 2 and 3, under a launcher or Ray, follows the curve of one process, whoever the reference is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.cli.main import main
from rlhf_dist.cli.paths import with_absolute_paths
from rlhf_dist.cli.programs import program_of
from rlhf_dist.cli.ray_launch import run_under_ray
from rlhf_dist.config.dpo import DPOConfig
from rlhf_dist.engines.process import free_port
from rlhf_dist.runs.metrics import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
PROGRAM = Path(__file__).parent / "programs" / "launched_often.py"
RUNS = {"zero2": (2, "self"), "zero3": (3, "self"), "zero3_other": (3, "other")}
Curves = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, run_ranks: Any, ray_session: None) -> Curves:
    """Metrics by run. Pairs are ragged, weighted, some softly labelled; a single one is held out, so there are fewer rows than ranks."""
    root = tmp_path_factory.mktemp("dpo_homes")
    records = [
        {
            "prompt": f"w{n} w{7 * n % 60}" * (1 + n % 3),
            "response_a": f" w{3 * n % 60}" * (1 + n % 7),
            "response_b": f" w{(5 * n + 1) % 60}" * (1 + n % 5),
            "p": (1.0, 0.8, 0.2, 0.5)[n % 4],
            "weight": (1, 2, 0.5)[n % 3],
        }
        for n in range(30)
    ]
    for name, rows in (("train", records[1:]), ("eval", records[:1])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stage in (0, 2, 3):
        (root / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.2)
    other.save_pretrained(root / "other")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(root / "other")

    def values(name: str, launcher: str = "spmd", stage: int = 0, reference: str = "self") -> dict[str, Any]:
        model = {"model": str(tiny_model), "deepspeed": str(root / f"zero{stage}.json"), "optim": {"lr": 3e-3}}
        return {
            "run": {"name": name, "output_dir": str(root), "seed": 5},
            "data": {"train": str(root / "train.jsonl"), "eval": str(root / "eval.jsonl"), "max_tokens": 32},
            "model": model | {"ranks": 2, "cpus_per_rank": 0.5, "microbatch_tokens": 64},
            "reference": {"model": str(root / "other") if reference == "other" else ""},
            "training": {"epochs": 2, "batch_size": 7, "evaluate_every": 4},
            "placement": {"launcher": launcher},
        }

    def file(name: str, **options: Any) -> str:
        path = root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values(name, **options)))
        return str(path)

    for reference in ("self", "other"):
        main(["dpo", "--config", file(f"plain_{reference}", reference=reference)])
    launched = [(file(name, stage=stage, reference=reference), str(free_port())) for name, (stage, reference) in RUNS.items()]
    run_ranks(PROGRAM, 2, "dpo", *(word for pair in launched for word in pair))
    run_under_ray(program_of(with_absolute_paths(DPOConfig.model_validate(values("ray", "ray", 3, "other")))))
    return {name: read_metrics(root / name / "metrics.jsonl") for name in ("plain_self", "plain_other", *RUNS, "ray")}


def assert_same(one: list[dict[str, Any]], other: list[dict[str, Any]], tolerance: float) -> None:
    for mine, reference in zip(one, other, strict=True):
        assert sorted(mine) == sorted(reference)
        for metric in reference:
            # Before a step margins are nothing but rounding, and accuracies the signs of it.
            rounding = reference["step"] < 2 and metric.endswith("rewards/accuracies")
            if not metric.startswith("perf/") and metric != "time" and not rounding:
                assert mine[metric] == pytest.approx(reference[metric], rel=tolerance, abs=tolerance), f"step {reference['step']}, {metric}"


@pytest.mark.parametrize("name", [*RUNS, "ray"])
def test_two_ranks_follow_the_curve_of_one_process(name: str, curves: Curves) -> None:
    plain = curves["plain_other" if name == "ray" or name.endswith("other") else "plain_self"]
    assert len(plain) == 11 and plain[-1]["loss"] < plain[1]["loss"] and plain[-1]["rewards/margins"] > 0.1
    assert_same(curves[name], plain, 1e-4)


def test_the_reference_makes_the_difference(curves: Curves) -> None:
    assert f"{curves['zero3'][1]['loss']:.6f}" == f"{curves['plain_self'][1]['loss']:.6f}" == "0.693147"
    assert abs(curves["zero3_other"][1]["rewards/margins"]) > 1e-3


def test_ray_and_the_launcher_agree_to_1e_6(curves: Curves) -> None:
    assert_same(curves["ray"], curves["zero3_other"], 1e-6)
