"""What all readers share: files in order, policy, split, counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.data.layouts import Demonstration
from rlhf_dist.data.reading import ReadOptions, RecordReader


class Anything(RecordReader):
    wanted = ("demonstrations", "messages", "prompts", "pairs")


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "x.jsonl"
    rows = [{"prompt": f"q{n % 40}", "completion": f"a{n}" if n % 10 else ""} for n in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_two_sides_hold_every_good_row_once_and_share_no_prompt(file: str) -> None:
    sides = {}
    for split in ("train", "eval"):
        reader = Anything([file], ReadOptions("drop", split, eval_fraction=0.3))  # type: ignore[arg-type]
        sides[split] = list(reader.records())
        counts = reader.counts
        assert counts.accepted == len(sides[split]) and counts.dropped == {"empty completion": 20}
        assert counts.accepted + counts.other_split + 20 == counts.rows == 200
    assert len(sides["train"]) + len(sides["eval"]) == 180
    assert not {record.prompt for record in sides["train"]} & {record.prompt for record in sides["eval"]}


def test_files_follow_each_other_and_each_pass_counts_anew(file: str) -> None:
    reader = Anything([file, file], ReadOptions("drop"))
    assert len(list(reader.records())) == 360 == len(list(reader.records())) and reader.counts.rows == 400


def test_a_fault_stops_by_default_at_its_line(file: str) -> None:
    with pytest.raises(UserError, match="empty") as caught:
        list(Anything([file]).records())
    assert caught.value.where == f"{file}:1"


def test_nothing_left_is_an_error_with_the_counts(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "q", "completion": ""}\n' * 3)
    with pytest.raises(UserError, match="0 of 3 rows accepted, 3 dropped"):
        list(Anything([str(path)], ReadOptions("drop")).records())
    with pytest.raises(ValueError, match="at least one file"):
        Anything([])


def test_layout_and_columns_are_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"ask": "q", "gold": "a", "completion": "b"}\n')
    (record,) = Anything([str(path)], ReadOptions(layout="demonstrations", columns={"prompt": "ask", "completion": "gold"})).records()
    assert isinstance(record, Demonstration) and (record.prompt, record.completion) == ("q", "a")
