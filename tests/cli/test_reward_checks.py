"""The quick look before a reward model is trained."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_dist.cli.reward_checks import check_reward_model
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.reward_model import RewardModelConfig

PAIR = {"prompt": "w1", "chosen": " w2", "rejected": " w3"}


def config(model: Path, rows: list[dict[str, Any]], folder: Path, **data: Any) -> RewardModelConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"data": {"train": str(path), "max_tokens": 32} | data, "model": {"model": str(model)}}
    return RewardModelConfig.model_validate(values)


def test_it_counts_what_it_looked_at(tiny_model: Path, tmp_path: Path) -> None:
    assert check_reward_model(config(tiny_model, [PAIR] * 300, tmp_path)) == {"rows looked at": 256}


@pytest.mark.parametrize(
    "bad", [PAIR | {"rejected": ""}, PAIR | {"rejected": " <pad>"}, PAIR | {"rejected": " w1" * 40}], ids=["empty", "pad", "long"]
)
def test_a_row_that_would_stop_the_run_is_named(tiny_model: Path, tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        check_reward_model(config(tiny_model, [PAIR, bad], tmp_path))
    assert "rows.jsonl:2" in str(caught.value)
    assert check_reward_model(config(tiny_model, [PAIR, bad], tmp_path, faults="drop", overlong="drop"))["rows looked at"] in (1, 2)


def test_a_classifier_of_several_labels_is_no_reward_model(tiny_model: Path, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2, id2label={0: "a", 1: "b"}).save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="has 2 labels"):
        check_reward_model(config(tmp_path / "m", [PAIR], tmp_path))


def test_a_report_that_cannot_be_drawn_is_said_at_once(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs plotly"):
        check_reward_model(config(tiny_model, [PAIR], tmp_path, eval_fraction=0.1))
    assert check_reward_model(config(tiny_model, [PAIR], tmp_path))


def test_a_row_that_the_chat_template_refuses_stops_or_is_left_out(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    refuses = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    tokenizer.chat_template = refuses + "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "m")
    rows = [{"prompt": [{"role": role, "content": "w1"}], "chosen": "w2", "rejected": "w3"} for role in ("user", "tool")]
    with pytest.raises(UserError, match="no tools") as caught:
        check_reward_model(config(tmp_path / "m", rows, tmp_path))
    assert "rows.jsonl:2" in str(caught.value) and "data.faults=drop" in caught.value.fix
    assert check_reward_model(config(tmp_path / "m", rows, tmp_path, faults="drop")) == {"rows looked at": 2}
