"""The quick look before an SFT run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rlhf_dist.cli.sft_checks import check_sft
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.sft import SFTConfig


def config(model: Path, rows: list[dict[str, object]], folder: Path, **data: object) -> SFTConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SFTConfig.model_validate({"data": {"train": str(path), "max_tokens": 32} | data, "model": {"model": str(model)}})


def test_it_counts_what_it_looked_at(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{n % 60}", "completion": " w2"} for n in range(300)]
    assert check_sft(config(tiny_model, rows, tmp_path)) == {"rows looked at": 256}


def test_a_faulty_row_is_named(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "w1", "completion": " w2"}, {"prompt": "w1", "completion": ""}]
    with pytest.raises(UserError) as caught:
        check_sft(config(tiny_model, rows, tmp_path))
    assert "rows.jsonl:2" in str(caught.value)
    assert check_sft(config(tiny_model, rows, tmp_path, faults="drop")) == {"rows looked at": 1}


def test_preferences_are_no_demonstrations(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="demonstrations"):
        check_sft(config(tiny_model, [{"prompt": "w1", "chosen": " w2", "rejected": " w3"}], tmp_path))


def test_fp16_on_a_cpu(tiny_model: Path, tmp_path: Path) -> None:
    given = config(tiny_model, [{"prompt": "w1", "completion": " w2"}], tmp_path)
    half = SFTConfig.model_validate(given.model_dump() | {"model": given.model.model_dump() | {"dtype": "fp16"}})
    with pytest.raises(UserError, match="fp16"):
        check_sft(half)


def test_a_row_that_the_chat_template_refuses_stops_or_is_left_out(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    refuses = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    tokenizer.chat_template = refuses + "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "m")
    answer = {"role": "assistant", "content": "w2"}
    rows: list[dict[str, object]] = [{"messages": [{"role": role, "content": "w1"}, answer]} for role in ("user", "tool")]
    with pytest.raises(UserError, match="no tools") as caught:
        check_sft(config(tmp_path / "m", rows, tmp_path))
    assert "rows.jsonl:2" in str(caught.value) and "data.faults=drop" in caught.value.fix
    assert check_sft(config(tmp_path / "m", rows, tmp_path, faults="drop")) == {"rows looked at": 2}


def test_the_look_counts_the_stop_token_that_the_run_will_put(tiny_model: Path, tmp_path: Path) -> None:
    """The tokenizer knows no eos, the model does: the row has three tokens and its end."""
    shutil.copytree(tiny_model, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "m")
    rows: list[dict[str, object]] = [{"prompt": "w1", "completion": " w2"}]
    with pytest.raises(UserError, match="the row has 4 tokens, the limit is 3"):
        check_sft(config(tmp_path / "m", rows, tmp_path, max_tokens=3))
