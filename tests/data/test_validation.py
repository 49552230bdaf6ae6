"""Typed rows of whole files: one layout a file, every bad row named, and the policy for them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from rlhf_dist.config.errors import UserError
from rlhf_dist.data.faults import RowFault
from rlhf_dist.data.validation import ReadCounts, Reading, accepted, faults, require_layout, typed_rows

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
SAME = PAIR | {"rejected": "a"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def reasons(path: str, reading: Reading = Reading()) -> list[str | None]:  # noqa: B008
    return [row.fault and row.fault.reason for row in typed_rows(path, reading)]


def test_rows_come_in_order_good_and_bad(tmp_path: Path) -> None:
    rows = list(typed_rows(write(tmp_path / "some.pairs.jsonl", [PAIR, SAME, PAIR | {"source": "web"}])))
    assert [row.number for row in rows] == [0, 1, 2] and {row.layout for row in rows} == {"pairs"}
    assert rows[1].record is None and rows[1].fault is not None and rows[1].fault.where.endswith("some.pairs.jsonl:2")
    assert rows[0].record is not None and rows[0].record.origin.source == "some.pairs"
    assert rows[2].record is not None and rows[2].record.origin.source == "web" and rows[2].row["source"] == "web"


def test_a_change_of_layout_is_named_at_its_line_and_never_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.jsonl", [PAIR, PAIR, {"prompt": "q", "completion": "a"}, PAIR])
    assert reasons(path) == [None, None, "mixed layouts", None]
    for policy in ("error", "drop"):
        with pytest.raises(UserError, match="began with pairs, and this row is one of demonstrations") as caught:
            list(accepted(typed_rows(path), ReadCounts(), policy))  # type: ignore[arg-type]
        assert caught.value.where == f"{path}:3" and "drop" not in caught.value.fix


def test_columns_that_parquet_fills_with_null_do_not_hide_a_change(tmp_path: Path) -> None:
    path = tmp_path / "union.parquet"
    columns = {"prompt": ["q", "q"], "completion": ["a", None], "chosen": [None, "a"], "rejected": [None, "b"]}
    pa.parquet.write_table(pa.table(columns), path)
    assert reasons(str(path)) == [None, "mixed layouts"]


def test_a_first_row_that_lost_its_answers_does_not_decide(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": None, "rejected": None}, PAIR])
    assert reasons(path) == ["null field", None]
    path = write(tmp_path / "b.jsonl", [{"prompt": "q"}, PAIR])
    assert reasons(path) == [None, "mixed layouts"]


def test_a_given_layout_is_taken_at_its_word(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "q", "answer": None}, {"prompt": "q", "answer": "for the reward"}])
    assert reasons(path) == ["null field", None]
    assert reasons(path, Reading("prompts")) == [None, None]
    assert reasons(path, Reading(columns={"completion": "prompt"})) == [None, None]


def test_a_layout_that_cannot_be_told_lists_the_columns(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="columns: text, n"):
        reasons(write(tmp_path / "x.jsonl", [{"text": "a", "n": 1}]))


def test_csv_text_that_looks_like_numbers_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("prompt,completion,weight\n1,2,0.5\n3,04,1\n")
    records = [row.record for row in typed_rows(str(path))]
    assert [(record.prompt, record.completion, record.weight) for record in records] == [("1", "2", 0.5), ("3", "04", 1.0)]  # type: ignore[union-attr]


def test_lines_that_cannot_be_read_are_faults_and_the_next_are_read(tmp_path: Path) -> None:
    path, good = tmp_path / "x.jsonl", json.dumps(PAIR).encode()
    path.write_bytes(b'{"prompt": "\xff"}\n' + good + b"\n{not json\n\n" + good + b"\n\n")
    counts = ReadCounts()
    found = list(faults([str(path)], Reading(), counts))
    assert [fault.where for fault in found] == [f"{path}:{line}" for line in (1, 3, 4)]
    assert counts.rows == 5 and counts.accepted == 2 and counts.dropped == {"unreadable row": 3}
    with pytest.raises(UserError, match="not UTF-8"):
        list(accepted(typed_rows(str(path)), ReadCounts(), "error"))


def test_a_truncated_archive_is_a_fault_of_the_file_under_every_policy(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    packed = gzip.compress(b"".join(json.dumps(PAIR | {"prompt": f"q{n * 7919}"}).encode() + b"\n" for n in range(5000)))
    path.write_bytes(packed[: len(packed) // 2])
    second = write(tmp_path / "y.jsonl", [SAME])
    counts = ReadCounts()
    found = list(faults([str(path), second], Reading(), counts))
    assert isinstance(found[0], UserError) and "cut short" in found[0].fix and isinstance(found[1], RowFault)
    with pytest.raises(UserError, match="cannot read"):
        list(accepted(typed_rows(str(path)), ReadCounts(), "drop"))


def test_drops_are_counted_by_reason_and_nothing_is_lost(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [PAIR, SAME, PAIR | {"chosen": ""}, SAME, PAIR])
    counts = ReadCounts()
    kept = [typed.number for typed, _ in accepted(typed_rows(path), counts, "drop")]
    assert kept == [0, 4] and counts.rows == counts.accepted + counts.dropped.total()
    assert counts.summary() == "2 of 5 rows accepted, 3 dropped (2 chosen equals rejected, 1 empty completion)"
    with pytest.raises(UserError, match="same text") as caught:
        list(accepted(typed_rows(path), ReadCounts(), "error"))
    assert caught.value.where == f"{path}:2"


def test_an_unwanted_layout_is_refused(tmp_path: Path) -> None:
    row = next(typed_rows(write(tmp_path / "x.jsonl", [PAIR])))
    require_layout(row, ("pairs",), "pairs", "")
    with pytest.raises(UserError, match="holds pairs, not prompts"):
        require_layout(row, ("prompts",), "prompts", "")


def test_chats_are_tried_on_the_template(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    user = {"role": "user", "content": "w1"}
    chats = [
        {"messages": [user, {"role": "assistant", "content": "w2"}]},
        {"messages": [user, user, {"role": "assistant", "content": "w2"}]},
    ]
    path = write(tmp_path / "x.jsonl", chats)
    (missing,) = faults([path], Reading(), ReadCounts(), tokenizer)
    assert isinstance(missing, UserError) and "no chat template" in missing.what and missing.where == f"{path}:1"
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.index0 % 2 %}{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
    )
    (refused,) = faults([path], Reading(), ReadCounts(), tokenizer)
    assert isinstance(refused, RowFault) and refused.reason == "refused by the chat template" and refused.where == f"{path}:2"
    tokenizer.chat_template = "{% for m in messages"
    (broken,) = faults([path], Reading(), ReadCounts(), tokenizer)
    assert isinstance(broken, UserError) and "is broken" in broken.what, "once for the file, not for every row"
