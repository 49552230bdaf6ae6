"""The quick look before an SFT run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
