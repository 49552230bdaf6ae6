"""SFT on two ranks, under each ZeRO stage, padded or packed, under a launcher or Ray, follows the curve of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_dist.cli.main import main
from rlhf_dist.cli.paths import with_absolute_paths
from rlhf_dist.cli.programs import program_of
from rlhf_dist.cli.ray_launch import run_under_ray
from rlhf_dist.config.sft import SFTConfig
from rlhf_dist.engines.process import free_port
from rlhf_dist.runs.metrics import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
PROGRAM = Path(__file__).parent / "programs" / "launched_often.py"
ZERO = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero3_packed": 3}
Curves = dict[str, list[dict[str, Any]]]
CURVES = {"loss", "grad_norm", "lr", "eval/loss", "eval/perplexity"}


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, run_ranks: Any, ray_session: None) -> Curves:
    """Metrics by run. Rows are ragged and weighted; the microbatches are small, so ranks have several, and unequal ones."""
    root = tmp_path_factory.mktemp("sft_homes")
    rows = root / "rows.jsonl"
    words = [" ".join(f"w{(n * k + k) % 60}" for k in range(1, 2 + n * n % 11)) for n in range(60)]
    records = [{"prompt": f"w{n} w{7 * n % 60}", "completion": f" {text}", "weight": (1, 2, 0.5)[n % 3]} for n, text in enumerate(words)]
    rows.write_text("".join(json.dumps(record) + "\n" for record in records))
    for stage in range(4):
        (root / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))

    def values(name: str, launcher: str = "spmd", stage: int = 0, packing: bool = False) -> dict[str, Any]:
        model = {"model": str(tiny_model), "deepspeed": str(root / f"zero{stage}.json"), "optim": {"lr": 3e-3}, "packing": packing}
        return {
            "run": {"name": name, "output_dir": str(root), "seed": 5},
            "data": {"train": str(rows), "eval_fraction": 0.2, "max_tokens": 32},
            "model": model | {"ranks": 2, "cpus_per_rank": 0.5, "microbatch_tokens": 48},
            "training": {"epochs": 2, "batch_size": 13, "evaluate_every": 3},
            "placement": {"launcher": launcher},
        }

    def file(name: str, **options: Any) -> str:
        path = root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values(name, **options)))
        return str(path)

    main(["sft", "--config", file("plain")])
    launched = [(file(name, stage=stage, packing=name.endswith("packed")), str(free_port())) for name, stage in ZERO.items()]
    run_ranks(PROGRAM, 2, "sft", *(word for pair in launched for word in pair))
    run_under_ray(program_of(with_absolute_paths(SFTConfig.model_validate(values("ray", "ray", 3)))))
    return {name: read_metrics(root / name / "metrics.jsonl") for name in ("plain", *ZERO, "ray")}


def assert_same(one: list[dict[str, Any]], other: list[dict[str, Any]], tolerance: float) -> None:
    for mine, reference in zip(one, other, strict=True):
        assert sorted(mine) == sorted(reference)
        for metric in CURVES & reference.keys():
            assert mine[metric] == pytest.approx(reference[metric], rel=tolerance), f"step {reference['step']}, {metric}"


@pytest.mark.parametrize("name", [*ZERO, "ray"])
def test_two_ranks_follow_the_curve_of_one_process(name: str, curves: Curves) -> None:
    plain = curves["plain"]
    assert len(plain) == 9 and plain[-1]["eval/loss"] < 0.98 * plain[0]["eval/loss"], "it learns, so agreement says something"
    assert_same(curves[name], plain, 1e-4)


def test_ray_and_the_launcher_agree_to_1e_6(curves: Curves) -> None:
    assert_same(curves["ray"], curves["zero3"], 1e-6)
