"""Whatever is done to a data file: its rows are what another reader says, or there is one message that names the place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import resource
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_dist.config.errors import UserError
from rlhf_dist.data import files
from rlhf_dist.data.faults import RowFault
from rlhf_dist.data.files import iter_rows, iter_rows_and_errors
from rlhf_dist.data.layouts import Origin
from rlhf_dist.data.parsing import parse
from rlhf_dist.data.validation import typed_rows

FUZZ = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
COLUMNS = st.sampled_from(
    ["prompt", "completion", "messages", "chosen", "rejected", "answers", "scores", "ranks", "label", "p", "margin", "weight", "source"]
)
GOOD = b'{"prompt": "a"}\n'


def outcome(path: Path) -> list[Any] | UserError:
    """Rows and errors, or the error that ended the file; each error can be printed."""
    try:
        rows = [row for _, row in iter_rows_and_errors(str(path), text_columns=("prompt", "completion"))]
    except UserError as error:
        rows = [error]
        assert str(path) in error.where and error.fix
    for row in rows:
        if isinstance(row, UserError):
            str(row).encode()
    return rows


@FUZZ
@given(st.lists(st.dictionaries(COLUMNS, JSON, max_size=4), min_size=1, max_size=5))
def test_any_json_rows_come_back_and_are_records_or_faults(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    assert outcome(path) == rows
    try:
        found = list(typed_rows(str(path)))
    except UserError as error:
        assert "cannot tell the layout" in error.what
    else:
        assert [typed.row for typed in found] == rows
        assert all((typed.record is None) != (typed.fault is None) for typed in found)


@FUZZ
@given(
    st.binary(max_size=8),
    st.integers(0, 80),
    st.integers(0, 20),
    st.sampled_from(["jsonl", "jsonl.gz", "csv", "csv.gz", "parquet", "arrow", "feather"]),
)
def test_damaged_bytes(tmp_path: Path, put: bytes, at: int, cut: int, ending: str) -> None:
    """CSV and JSON lines against plain libraries; the binary formats must not raise (`benchmarks/fuzz.py` holds them to pyarrow)."""
    path = tmp_path / f"a.{ending}"
    content = whole(ending)
    path.write_bytes(content[:at] + put + content[at + cut :])
    found = outcome(path)
    read = [row for row in found if not isinstance(row, UserError)]
    if ending == "csv" and len(read) == len(found):
        lines = [line for line in csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True) if line]
        assert len(lines) == len(found) + 1
        assert [list(row) for row in read] == [lines[0]] * len(read)
        where = [lines[0].index(name) for name in ("prompt", "completion") if name in lines[0]]
        assert [[row[lines[0][n]] for n in where] for row in read] == [[line[n] for n in where] for line in lines[1:]]


def whole(ending: str) -> bytes:
    rows = [{"prompt": f"q {n}, „it“", "completion": f'say "{n}"\nagain', "weight": n + 0.5} for n in range(4)]
    if ending.startswith("jsonl"):
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    elif ending.startswith("csv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode()
    else:
        sink, table = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
        if ending == "parquet":
            pa.parquet.write_table(table, sink)
        else:
            with (pa.ipc.new_stream if ending == "arrow" else pa.ipc.new_file)(sink, table.schema) as batches:
                batches.write_table(table)
        return bytes(sink.getvalue())
    return gzip.compress(content) if ending.endswith("gz") else content


BAD: dict[str, tuple[str, bytes, str]] = {
    "a quote in the last column that is never closed": ("a.csv", b'prompt,n\na,"x\nb,y\nc,z\n', "unexpected end of data"),
    "text after a closed quote": ("a.csv", b'prompt,n\na,"x"y\nb,z\n', "expected after"),
    "a NUL in CSV": ("a.csv", b"prompt,n\na\0b,1\n", "NUL"),
    "a key twice": ("a.jsonl", b'{"prompt": "a", "prompt": "b"}\n', "'prompt' comes twice"),
    "an inner key twice": ("a.jsonl", b'{"m": [{"role": "a", "role": "b"}]}\n', "'role' comes twice"),
    "NaN": ("a.jsonl", b'{"prompt": "a", "margin": NaN}\n', "NaN is no finite number"),
    "a number that is too large": ("a.jsonl", b'{"prompt": "a", "margin": 1e999}\n', "1e999 is no finite number"),
    "thousands of digits": ("a.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}\n", "digits"),
    "deep": ("a.jsonl", b'{"prompt": ' + b"[" * 200 + b"]" * 200 + b"}\n", "nested more than 100 levels"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_was_taken_or_fell_over(tmp_path: Path, case: str) -> None:
    name, content, said = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        list(iter_rows(str(tmp_path / name)))
    assert name in caught.value.where


def test_many_levels_that_are_not_deep(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": [[]] * 300}) + "\n")
    assert [row for _, row in iter_rows(str(tmp_path / "a.jsonl"))] == [{"prompt": [[]] * 300}]


def test_a_line_without_end_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    """1 GiB out of an archive of 1 MiB."""
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD) + gzip.compress(b"x" * 2**24, 9) * 64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="longer than 64 MiB") as caught:
        list(iter_rows(str(path)))
    assert caught.value.where == f"{path}:2"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


def test_a_line_of_just_the_longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LINE_BYTES", len(GOOD))
    (tmp_path / "a.jsonl").write_bytes(GOOD * 2)
    assert len(list(iter_rows(str(tmp_path / "a.jsonl")))) == 2
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'{"prompt": "ab"}\n')
    with pytest.raises(UserError, match="longer"):
        list(iter_rows(str(tmp_path / "a.jsonl")))


def test_offsets_that_point_outside_are_not_followed(tmp_path: Path) -> None:
    """Arrow's own reader does not look; the text would come out of foreign memory, or the process would die."""
    path = tmp_path / "a.arrow"
    with pa.ipc.new_stream(path, pa.schema([("prompt", pa.string())])) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([pa.array(["a", "bc"])], ["prompt"]))
    content = path.read_bytes()
    at = content.index(b"\0\0\0\0\1\0\0\0\3\0\0\0")
    path.write_bytes(content[: at + 8] + b"\xff\xff\xff\0" + content[at + 12 :])
    with pytest.raises(UserError, match="cannot read the file"):
        list(iter_rows(str(path)))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.list_(pa.string()), pa.struct([("a", pa.large_list(pa.string()))])])
def test_text_that_is_not_utf8_spares_the_other_rows(tmp_path: Path, kind: pa.DataType) -> None:
    plain: Any = files._as_bytes(kind)
    values = [{"a": [text]} if pa.types.is_struct(kind) else [text] if pa.types.is_list(kind) else text for text in (b"a", b"\xff", b"c")]
    with pa.ipc.new_stream(tmp_path / "a.arrow", pa.schema([("prompt", kind)])) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([pa.array(values, plain).view(kind)], ["prompt"]))
    rows = outcome(tmp_path / "a.arrow")
    assert [isinstance(row, UserError) for row in rows] == [False, True, False]
    assert "not UTF-8" in rows[1].what and rows[1].where.endswith("row 2")


def test_a_value_that_python_has_none_for_is_a_fault_of_its_row(tmp_path: Path) -> None:
    days = pa.array([0, 10**18], pa.int64()).view(pa.timestamp("s"))
    table = pa.table({"prompt": ["a", "b"], "day": days})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    rows = outcome(tmp_path / "a.arrow")
    assert rows[0] == {"prompt": "a", "day": datetime(1970, 1, 1)} and "cannot be read" in rows[1].what


@pytest.mark.parametrize(
    ("layout", "row", "reason"),
    [
        ("pairs", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 10**400}, "number out of range"),
        ("pairs", {"prompt": "q", "chosen": "a", "rejected": "b", "weight": 10**400}, "number out of range"),
        ("rankings", {"prompt": "q", "answers": ["a", "b"], "scores": [1, float("inf")]}, "number out of range"),
        ("rankings", {"prompt": "q", "answers": ["a", "b"], "ranks": [10**5000, 10**5000]}, "number out of range"),
        ("labelled", {"prompt": "q", "response_a": "a", "response_b": "b", "p": 10**5000}, "label outside the options"),
        ("labelled", {"prompt": "q", "response_a": "a", "response_b": "b", "label": 10**5000}, "label outside the options"),
    ],
)
def test_numbers_that_no_float_holds_are_faults(layout: Any, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowFault) as caught:
        parse(row, layout, Origin("f", 0, "f"))
    assert caught.value.reason == reason and len(str(caught.value.detail)) < 500
