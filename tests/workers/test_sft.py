"""Rows of an SFT run: what is read, split, cut and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.sft import SFTConfig, SftSection
from rlhf_dist.models.loading import load_tokenizer
from rlhf_dist.workers.sft import sft_rows


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": f"w{n}", "completion": " w1" * (1 + n % 4)} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "w1", "completion": ""}]))
    return path


def config(model: Path, file: Path, **data: Any) -> SFTConfig:
    values = {"train": str(file), "max_tokens": 32, "faults": "drop"} | data
    return SFTConfig.model_validate({"data": values, "model": {"model": str(model)}, "training": {"batch_size": 16, "epochs": 2}})


def test_rows_are_split_by_prompt_and_faults_counted_once(tiny_model: Path, rows_file: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    rows = sft_rows(config(tiny_model, rows_file, eval_fraction=0.3), tokenizer)
    assert len(rows.train) + len(rows.evaluation) == 40 and 4 < len(rows.evaluation) < 20
    prompts = [{int(row.tokens[1]) for row in part} for part in (rows.train, rows.evaluation)]
    assert not prompts[0] & prompts[1]
    assert sum(rows.fates.values()) == 1
    assert all(row.origin.where.endswith(f"rows.jsonl:{int(row.tokens[1]) - 3}") for part in (rows.train, rows.evaluation) for row in part)
    assert all(row.tokens[-1] == tokenizer.eos_token_id and row.trained[-1] for row in rows.train)
    with pytest.raises(UserError, match=r"rows.jsonl:41"):
        sft_rows(config(tiny_model, rows_file, faults="error"), tokenizer)


def test_what_is_too_long(tiny_model: Path, rows_file: Path) -> None:
    """Rows of 4 to 7 tokens: start, prompt, one to four words, end."""
    tokenizer = load_tokenizer(str(tiny_model))
    with pytest.raises(UserError, match="the row has 6 tokens, the limit is 5") as caught:
        sft_rows(config(tiny_model, rows_file, max_tokens=5), tokenizer)
    assert caught.value.where.endswith("rows.jsonl:3")
    dropped = sft_rows(config(tiny_model, rows_file, max_tokens=5, overlong="drop"), tokenizer)
    assert len(dropped.train) == 20 and dropped.fates["dropped: longer than data.max_tokens"] == 20
    cut = sft_rows(config(tiny_model, rows_file, max_tokens=5, overlong="truncate"), tokenizer)
    assert len(cut.train) == 40 and max(len(row) for row in cut.train) == 5 and cut.fates["cut: longer than data.max_tokens"] == 20
    nothing = sft_rows(config(tiny_model, rows_file, max_tokens=2, overlong="truncate"), tokenizer)
    assert not nothing.train and nothing.fates == {
        "dropped: nothing of the completion fits data.max_tokens": 40,
        "dropped: empty completion": 1,
    }, "a row is counted once"


def test_a_completion_without_a_token_is_no_matter_of_length(tiny_model: Path, tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "rows.jsonl", load_tokenizer(str(tiny_model))
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("!", "")
    tokenizer.eos_token = None
    path.write_text('{"prompt": "w1", "completion": " !"}\n{"prompt": "w1", "completion": " w2"}\n')
    (tmp_path / "m").mkdir()
    given = json.loads((tiny_model / "config.json").read_text()) | {"eos_token_id": None}
    (tmp_path / "m" / "config.json").write_text(json.dumps(given))
    rows = sft_rows(config(tmp_path / "m", path), tokenizer)
    assert len(rows.train) == 1 and rows.fates == {"dropped: a completion without a token": 1}


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_a_dialogue_that_the_template_refuses_is_a_fault_as_any_other(tiny_model: Path, tmp_path: Path, loss_on: str) -> None:
    tokenizer, path = load_tokenizer(str(tiny_model)), tmp_path / "rows.jsonl"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
        "{{ m['content'] }} {% endfor %}"
    )
    roles = ["user", "tool", "user"]
    rows = [{"messages": [{"role": role, "content": "w1"}, {"role": "assistant", "content": "w2"}]} for role in roles]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = config(tiny_model, path).model_copy(update={"sft": SftSection(loss_on=loss_on)})
    kept = sft_rows(given, tokenizer)
    assert len(kept.train) == 2 and kept.fates == {"dropped: refused by the chat template": 1}
    assert all(row.tokens[-1] == tokenizer.eos_token_id and row.trained[-1] for row in kept.train)
    stops = given.model_copy(update={"data": given.data.model_copy(update={"faults": "error"})})
    with pytest.raises(UserError, match="no tools here") as caught:
        sft_rows(stops, tokenizer)
    assert caught.value.where.endswith("rows.jsonl:2") and "data.faults=drop" in caught.value.fix
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        sft_rows(given, tokenizer)


def test_the_schedule_spans_the_run(tiny_model: Path, rows_file: Path) -> None:
    given = config(tiny_model, rows_file)
    assert given.training.total_steps(40) == 6
    short = SFTConfig.model_validate(given.model_dump() | {"training": {"batch_size": 16, "max_steps": 4, "epochs": 9}})
    assert short.training.total_steps(40) == 4
