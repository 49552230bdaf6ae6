from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_dist.config.errors import UserError
from rlhf_dist.runs.summary import HeldOut, Summary, config_hash, headline, versions, write_summary


def test_versions_are_those_installed() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert set(found) == {"python", "rlhf_dist", "torch", "transformers", "deepspeed", "ray", "peft", "pyarrow"}


def test_versions_import_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "deepspeed", "ray", "peft", "pyarrow")
    code = f"import sys; from rlhf_dist.runs.summary import versions; versions(); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_package_that_is_absent_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_dist.runs.summary.PACKAGES", ("no_such_package_at_all",))
    assert versions()["no_such_package_at_all"] is None


def test_the_hash_tells_configs_apart() -> None:
    assert config_hash("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert config_hash("a: 1\n") != config_hash("a: 2\n")


def test_a_summary_round_trips(tmp_path: Path) -> None:
    score = {"mean": 0.1 + 0.2, "low": 0.2, "high": 0.4}
    summary = Summary(
        name="α",
        seed=3,
        config_sha256=config_hash(""),
        steps=15,
        optimizer_steps=60,
        wall_seconds=12.5,
        kl=1.5,
        held_out=HeldOut({"score": score}, {"score": score}),
        tokens_per_second={"generate": 100.0},
        dropped={"abstained": 2},
    )
    path = tmp_path / "summary.json"
    write_summary(path, summary.to_dict())
    assert json.loads(path.read_text(encoding="utf-8")) == summary.to_dict()
    assert headline(json.loads(path.read_text(encoding="utf-8"))) == [
        "finished 15 steps in 12.5 s",
        "held-out reward 0.300 [0.200, 0.400] -> 0.300 [0.200, 0.400]",
        "kl per sequence 1.50 nats",
        "dropped samples: 2 abstained",
    ]


def test_a_run_without_held_out_prompts_has_a_headline() -> None:
    assert headline(Summary("a", 0, "", 1, 1, 2.0).to_dict()) == ["finished 1 steps in 2.0 s"]


def test_a_figure_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    with pytest.raises(UserError, match=r"held_out.after.score.1 is nan"):
        write_summary(path, {"held_out": {"after": {"score": [1.0, float("nan")]}}})
    with pytest.raises(TypeError):
        write_summary(path, {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_where_the_best_model_is_or_why_there_is_none() -> None:
    assert headline({"best_step": 4, "best": "export/best"}) == ["best on held-out rows: step 4: export/best"]
    assert headline({"best_step": 0, "best": "no step was better"}) == ["best on held-out rows: step 0: no step was better"]
    assert headline({"best_step": None, "best": None}) == []
