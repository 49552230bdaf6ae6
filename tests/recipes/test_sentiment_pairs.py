"""The pairs of the sentiment recipe: best over worst, held-out openings apart, and a model that learns from them tells happier stories."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.runs.metrics import read_metrics

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "recipes" / "sentiment"
HAPPY, GLAD, PLAIN, SAD = " She was happy and loved it.", " She liked it.", " It was a stone.", " She was sad and cried."


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """The recipe's scripts, as Python finds them when one of them is started."""
    pytest.importorskip("vaderSentiment", reason="the recipe's pairs need the package vaderSentiment (extra dev)")
    monkeypatch.syspath_prepend(str(RECIPE))
    yield importlib.import_module("make_pairs"), importlib.import_module("measure")


def test_best_over_worst(scripts: tuple[ModuleType, ModuleType]) -> None:
    rows = scripts[0].best_over_worst("Mia", [PLAIN, HAPPY, SAD, GLAD], 2)
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == [("Mia", HAPPY, SAD), ("Mia", GLAD, PLAIN)]
    assert rows[0]["margin"] > rows[1]["margin"] > 0
    assert len(scripts[0].best_over_worst("Mia", [PLAIN, HAPPY, SAD, GLAD], 1)) == 1


def test_equal_scores_and_empty_stories_make_no_pair(scripts: tuple[ModuleType, ModuleType]) -> None:
    assert scripts[0].best_over_worst("Mia", [PLAIN, PLAIN, " It was a tree.", " It was a house."], 2) == []
    assert scripts[0].best_over_worst("Mia", [HAPPY, " "], 1) == []


def test_openings_are_held_out_as_in_the_ppo_recipe(scripts: tuple[ModuleType, ModuleType]) -> None:
    train, held_out = scripts[0].openings()
    assert (len(train), len(held_out)) == (185, 55) and not set(train) & set(held_out)


@pytest.mark.slow
def test_from_samples_to_happier_stories(
    scripts: tuple[ModuleType, ModuleType], shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe in small: 40 openings, 80 pairs, 10 steps."""
    make_pairs, measure = scripts
    model = str(shared / "models" / "stories260K")
    train, held_out = (prompts[:count] for prompts, count in zip(make_pairs.openings(), (40, 12), strict=True))
    monkeypatch.setattr(make_pairs, "openings", lambda: (train, held_out))
    monkeypatch.setattr("sys.argv", ["make_pairs.py", model, "--output", str(tmp_path), "--samples", "8", "--pairs", "2"])
    make_pairs.main()
    files = {name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("train", "eval")}
    assert 70 <= len(files["train"]) <= 80 and {row["prompt"] for row in files["eval"]} <= set(held_out)
    assert all(row["margin"] > 0 for row in files["train"])
    given = {
        "data.train": tmp_path / "train.jsonl", "data.eval": tmp_path / "eval.jsonl", "model.model": model, "run.output_dir": tmp_path,
        "training.batch_size": 8, "dpo.beta": 0.1, "placement.launcher": "spmd",
    }  # fmt: skip
    main(["dpo", "--config", str(RECIPE / "dpo.yaml"), *(f"{key}={value}" for key, value in given.items())])
    lines = read_metrics(tmp_path / "dpo" / "metrics.jsonl")
    assert f"{lines[1]['loss']:.6f}" == "0.693147"
    assert lines[-1]["eval/rewards/accuracies"] > 0.6 and lines[-1]["eval/rewards/margins"] > 0.1
    (before, _), (after, gain) = measure.measure([model, str(tmp_path / "dpo" / "export" / "model")], 8, 0, held_out)
    assert before.mean == pytest.approx(0.5, abs=0.15) and after.mean > before.mean and gain.low is not None and gain.low > 0.1
