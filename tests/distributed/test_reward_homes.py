"""Training of a reward model on two ranks, under ZeRO 2 and 3, follows the curve of one process, and reports the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_dist.cli.main import main
from rlhf_dist.engines.process import free_port
from rlhf_dist.runs.metrics import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
PROGRAM = Path(__file__).parent / "programs" / "launched_often.py"
CURVES = {"loss", "accuracy", "rewards/margins", "grad_norm", "lr", "eval/loss", "eval/accuracy"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, run_ranks: Any) -> dict[str, Path]:
    """Folders by run. Pairs and rankings, ragged and weighted; microbatches are small, so ranks have several, and unequal ones."""
    root = tmp_path_factory.mktemp("reward_homes")
    words = [" ".join(f"w{(n * k + k) % 60}" for k in range(1, 2 + n * n % 9)) for n in range(60)]
    pairs = [
        {"prompt": f"w{n}", "chosen": f" w1 {text}", "rejected": f" {text} w2", "weight": (1, 2, 0.5)[n % 3]}
        for n, text in enumerate(words)
    ]
    rankings = [{"prompt": f"w{n} w{n}", "answers": [f" w1 {words[n]}", " w3 w4", " w2"], "ranks": [1, 2, 3]} for n in range(20)]
    for name, rows in (("pairs", pairs), ("rankings", rankings)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def file(name: str, stage: int) -> str:
        (root / f"{name}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        model = {"model": str(tiny_model), "deepspeed": str(root / f"{name}.json"), "optim": {"lr": 3e-3}, "microbatch_tokens": 60}
        values = {
            "run": {"name": name, "output_dir": str(root), "seed": 5},
            "data": {"train": [str(root / f"{kind}.jsonl") for kind in ("pairs", "rankings")], "eval_fraction": 0.3, "max_tokens": 32},
            "model": model,
            "reward_model": {"centring": 0.01},
            "training": {"epochs": 2, "batch_size": 15},
            "placement": {"launcher": "spmd"},
        }
        path = root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    main(["reward", "--config", file("plain", 0)])
    run_ranks(PROGRAM, 2, "reward", *(word for stage in (2, 3) for word in (file(f"zero{stage}", stage), str(free_port()))))
    return {name: root / name for name in ("plain", "zero2", "zero3")}


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_two_ranks_follow_the_curve_of_one_process(name: str, runs: dict[str, Path]) -> None:
    plain, other = (read_metrics(runs[each] / "metrics.jsonl") for each in ("plain", name))
    assert len(plain) > 6 and plain[-1]["eval/loss"] < 0.8 * plain[0]["eval/loss"], "it learns, so agreement says something"
    for mine, reference in zip(other, plain, strict=True):
        assert sorted(mine) == sorted(reference)
        for metric in CURVES & reference.keys():
            assert mine[metric] == pytest.approx(reference[metric], rel=1e-4, abs=1e-4), f"step {reference['step']}, {metric}"


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_the_report_and_the_export_are_those_of_one_process(name: str, runs: dict[str, Path]) -> None:
    plain, other = (json.loads((runs[each] / "summary.json").read_text()) for each in ("plain", name))
    assert other["rows"] == plain["rows"] and other["best_step"] == plain["best_step"]
    for figure in ("accuracy", "train_accuracy", "baselines"):
        assert other["report"][figure] == plain["report"][figure]
    assert other["report"]["ece"] == pytest.approx(plain["report"]["ece"], abs=1e-3)
    assert (runs[name] / "report" / "report.html").is_file() and (runs[name] / "export" / "best" / "model.safetensors").is_file()
