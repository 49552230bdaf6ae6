"""Files are written whole, read back as written, or refused."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.data.files import iter_rows
from rlhf_dist.data.writing import WRITABLE, RowWriter, refuse_overwriting, writable_ending

FLAT = [{"prompt": f'q{n}, "quoted"\nline', "completion": "é𝄞", "n": n} for n in range(3000)]
CHAT = [{"messages": [{"role": "user", "content": f"q{n}"}], "ranks": [1.0, 2.0]} for n in range(1500)]


def write(path: Path, rows: list[dict[str, Any]]) -> int:
    with RowWriter(path) as writer:
        for row in rows:
            writer.write(row)
    return writer.rows


@pytest.mark.parametrize("ending", WRITABLE)
def test_rows_come_back_as_they_were(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "new" / f"x{ending}"
    assert write(path, FLAT) == 3000 and [row for _, row in iter_rows(str(path))] == FLAT
    first = path.read_bytes()
    write(path, FLAT)
    assert path.read_bytes() == first and [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_lists_come_back_as_they_were(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    write(path, CHAT)
    assert [row for _, row in iter_rows(str(path))] == CHAT


def test_an_error_leaves_nothing_and_spoils_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("before")
    for ending in ("jsonl", "jsonl.gz", "csv", "parquet"):
        other = tmp_path / f"x.{ending}"
        with pytest.raises(RuntimeError, match="stop"), RowWriter(other) as writer:
            writer.write({"a": "b"})
            raise RuntimeError("stop")
    assert path.read_text() == "before" and [file.name for file in tmp_path.iterdir()] == ["x.jsonl"]


def test_what_a_format_cannot_hold_is_refused_and_not_lost(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'messages'"):
        write(tmp_path / "x.csv", CHAT)
    with pytest.raises(UserError, match="differ in their columns"):
        write(tmp_path / "x.csv", [{"a": "1"}, {"a": "1", "b": "2"}])
    with pytest.raises(UserError, match="Parquet cannot hold") as caught:
        write(tmp_path / "x.parquet", [*FLAT, {"prompt": "q", "new": 1}])
    assert "rows 2049 to 3001" in caught.value.where
    named = {"messages": [{"role": "user", "content": "q", "name": "me"}], "ranks": [1.0]}
    with pytest.raises(UserError, match="Parquet cannot hold"):
        write(tmp_path / "x.parquet", [*CHAT, named])
    with pytest.raises(UserError, match="Parquet cannot hold"):
        write(tmp_path / "x.parquet", [{"a": 1}, {"a": "text"}])
    with pytest.raises(UserError, match="JSON cannot hold bytes"):
        write(tmp_path / "x.jsonl", [{"a": b"raw"}])
    assert not list(tmp_path.iterdir())


def test_dates_become_iso_text_in_json(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", [{"day": datetime.date(2024, 2, 29)}])
    assert json.loads((tmp_path / "x.jsonl").read_text()) == {"day": "2024-02-29"}


def test_endings_and_inputs_are_checked(tmp_path: Path) -> None:
    assert writable_ending("a.JSONL.gz") == ".jsonl.gz"
    with pytest.raises(UserError, match="which format"):
        writable_ending("a.arrow")
    with pytest.raises(UserError, match="one of the inputs"):
        refuse_overwriting(tmp_path / "a" / ".." / "x.jsonl", [str(tmp_path / "x.jsonl")])
