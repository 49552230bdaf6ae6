"""The quick look before a DPO run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.cli.dpo_checks import check_dpo
from rlhf_dist.config.dpo import DPOConfig
from rlhf_dist.config.errors import UserError

GOOD = {"prompt": "w1", "chosen": " w2", "rejected": " w3"}


def config(model: Path, rows: list[dict[str, Any]], folder: Path, reference: str = "", **data: Any) -> DPOConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"data": {"train": str(path), "max_tokens": 32} | data, "model": {"model": str(model)}, "reference": {"model": reference}}
    return DPOConfig.model_validate(values)


def test_it_counts_what_it_looked_at(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{n % 60}", "chosen": " w2", "rejected": " w3"} for n in range(300)]
    assert check_dpo(config(tiny_model, rows, tmp_path)) == {"pairs looked at": 256}


def test_rankings_are_their_pairs(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "w1", "answers": [" w2", " w3", " w4"], "scores": [3, 2, 1]}]
    assert check_dpo(config(tiny_model, rows, tmp_path)) == {"pairs looked at": 3}


def test_a_faulty_row_is_named(tiny_model: Path, tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"rejected": " w2"}]
    with pytest.raises(UserError, match="the same text") as caught:
        check_dpo(config(tiny_model, rows, tmp_path))
    assert "rows.jsonl:2" in str(caught.value)
    assert check_dpo(config(tiny_model, rows, tmp_path, faults="drop")) == {"pairs looked at": 1}


def test_a_reference_needs_the_context_and_the_vocabulary(tiny_model: Path, tmp_path: Path) -> None:
    assert check_dpo(config(tiny_model, [GOOD], tmp_path, str(tiny_model))) == {"pairs looked at": 1}
    tokenizer, shape = AutoTokenizer.from_pretrained(tiny_model), AutoConfig.from_pretrained(tiny_model)
    short, small, missing = (tmp_path / name for name in ("short", "small", "missing"))
    shape.max_position_embeddings = 16
    AutoModelForCausalLM.from_config(shape).save_pretrained(short)
    shape.max_position_embeddings, shape.vocab_size = 128, len(tokenizer) - 1
    AutoModelForCausalLM.from_config(shape).save_pretrained(small)
    for folder in (short, small):
        tokenizer.save_pretrained(folder)
    wrong = {
        short: "reference's context of 16",
        small: r"the reference model knows 63 tokens, the tokenizer of model.model has 64\n(.*\n)*.*of model.model$",
        missing: "no model folder",
    }
    for folder, message in wrong.items():
        with pytest.raises(UserError, match=message):
            check_dpo(config(tiny_model, [GOOD], tmp_path, str(folder)))


def test_fp16_on_a_cpu(tiny_model: Path, tmp_path: Path) -> None:
    given = config(tiny_model, [GOOD], tmp_path)
    half = DPOConfig.model_validate(given.model_dump() | {"model": given.model.model_dump() | {"dtype": "fp16"}})
    with pytest.raises(UserError, match="fp16"):
        check_dpo(half)


def test_a_row_that_the_chat_template_refuses_stops_or_is_left_out(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    refuses = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    tokenizer.chat_template = refuses + "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "m")
    rows = [{"prompt": [{"role": role, "content": "w1"}], "chosen": "w2", "rejected": "w3"} for role in ("user", "tool")]
    with pytest.raises(UserError, match="no tools") as caught:
        check_dpo(config(tmp_path / "m", rows, tmp_path))
    assert "rows.jsonl:2" in str(caught.value) and "data.faults=drop" in caught.value.fix
    assert check_dpo(config(tmp_path / "m", rows, tmp_path, faults="drop")) == {"pairs looked at": 2}
