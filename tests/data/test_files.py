"""Every format gives the same rows; every bad file is one error that names the place; memory stays bounded."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.data import files
from rlhf_dist.data.files import iter_rows, iter_rows_and_errors, place

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
ROWS = [{"prompt": f"line one\nof {i}, „quoted“ \u2028 ✓", "label": i, "weight": i / 4, "good": i % 2 == 0} for i in range(1000)]


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def csv_bytes(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pa.csv.write_csv(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def write_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=300)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "rows.jsonl": lambda p: p.write_bytes(json_lines(ROWS)),
    "rows.json-lines": lambda p: p.write_bytes(json_lines(ROWS)),
    "rows.JSONL": lambda p: p.write_bytes(json_lines(ROWS)),
    "bom.jsonl": lambda p: p.write_bytes(b"\xef\xbb\xbf" + json_lines(ROWS)),
    "crlf.jsonl": lambda p: p.write_bytes(json_lines(ROWS).replace(b"\n", b"\r\n")),
    "no_last_newline.jsonl": lambda p: p.write_bytes(json_lines(ROWS)[:-1]),
    "blank_end.jsonl": lambda p: p.write_bytes(json_lines(ROWS) + b"\n  \n\n"),
    "rows.jsonl.gz": lambda p: p.write_bytes(gzip.compress(json_lines(ROWS))),
    "two_members.jsonl.gz": lambda p: p.write_bytes(gzip.compress(json_lines(ROWS[:400])) + gzip.compress(json_lines(ROWS[400:]))),
    "rows.csv": lambda p: p.write_bytes(csv_bytes(ROWS)),
    "rows.csv.gz": lambda p: p.write_bytes(gzip.compress(csv_bytes(ROWS))),
    "rows.parquet": lambda p: pa.parquet.write_table(pa.Table.from_pylist(ROWS), p, row_group_size=300),
    "rows.arrow": write_stream,
    "rows.feather": lambda p: pa.feather.write_feather(pa.Table.from_pylist(ROWS), p),
}


@pytest.mark.parametrize("name", WRITERS)
def test_all_formats_give_identical_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert list(iter_rows(str(tmp_path / name))) == list(enumerate(ROWS))


def test_json_rows_may_differ_and_nest(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "x": 1}, {"messages": [{"role": "user", "content": "hi", "meta": {"k": [1, None]}}]}, {"x": "text"}, {}]
    (tmp_path / "mixed.jsonl").write_bytes(json_lines(rows))
    assert [row for _, row in iter_rows(str(tmp_path / "mixed.jsonl"))] == rows


@pytest.mark.parametrize("name", ["m.parquet", "m.arrow"])
def test_nested_messages_are_python_objects(tmp_path: Path, name: str) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}]
    table = pa.Table.from_pylist(rows)
    if name.endswith("parquet"):
        pa.parquet.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_file(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    assert list(iter_rows(str(tmp_path / name))) == [(0, rows[0])]


def test_csv_types(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("prompt,n,day,empty,note\n12,1,2020-01-01,,\n7,,2020-01-02,,NA\n")
    assert [row for _, row in iter_rows(str(path), text_columns=("prompt",))] == [
        {"prompt": "12", "n": 1, "day": "2020-01-01", "empty": "", "note": ""},
        {"prompt": "7", "n": None, "day": "2020-01-02", "empty": "", "note": "NA"},
    ]
    assert next(iter_rows(str(path)))[1]["prompt"] == 12


def truncated(data: bytes) -> bytes:
    return gzip.compress(data)[:-20]


GOOD = b'{"prompt": "a"}\n'
BAD: dict[str, tuple[str, bytes | None, str, str]] = {
    "missing": ("none.jsonl", None, "does not exist", "none.jsonl"),
    "missing parquet": ("none.parquet", None, "does not exist", "none.parquet"),
    "missing arrow": ("none.arrow", None, "does not exist", "none.arrow"),
    "missing csv": ("none.csv.gz", None, "does not exist", "none.csv.gz"),
    "unknown ending": ("a.txt", GOOD, "cannot tell the format of the data file (.txt)", "a.txt"),
    "no ending": ("prompts", GOOD, "no ending", "prompts"),
    "gzipped parquet": ("a.parquet.gz", GOOD, ".parquet.gz", "a.parquet.gz"),
    "empty": ("a.jsonl", b"", "no rows", "a.jsonl"),
    "only blank lines": ("a.jsonl", b"\n\n", "no rows", "a.jsonl"),
    "empty csv": ("a.csv", b"", "Empty CSV", "a.csv"),
    "csv with only a header": ("a.csv", b"prompt,n\n", "no rows", "a.csv"),
    "empty parquet": ("a.parquet", b"", "0 bytes", "a.parquet"),
    "empty arrow": ("a.arrow", b"", "cannot read", "a.arrow"),
    "malformed line": ("a.jsonl", GOOD * 2 + b'{"prompt": "b"\n' + GOOD, "not a JSON line", "a.jsonl:3"),
    "cut last line": ("a.jsonl", GOOD + GOOD[:-5], "not a JSON line", "a.jsonl:2"),
    "bottomless": ("a.jsonl", GOOD + b"[" * 100_000 + b"\n", "not a JSON line", "a.jsonl:2"),
    "truncated gzip": ("a.jsonl.gz", truncated(GOOD * 1000), "Truncated compressed stream", "a.jsonl.gz:"),
    "truncated csv gzip": ("a.csv.gz", truncated(csv_bytes(ROWS)), "Truncated compressed stream", "a.csv.gz"),
    "not gzip": ("a.jsonl.gz", GOOD, "header", "a.jsonl.gz:1"),
    "gzip unnamed": ("a.jsonl", gzip.compress(GOOD), "looks gzipped", "a.jsonl:1"),
    "not UTF-8": ("a.jsonl", GOOD + b'{"prompt": "\xff\xfe"}\n', "not UTF-8", "a.jsonl:2"),
    "half a surrogate pair": ("a.jsonl", GOOD + b'{"prompt": "\\ud83d"}\n', "not UTF-8", "a.jsonl:2"),
    "csv not UTF-8": ("a.csv", b"prompt,n\na,1\n\xff\xfe,2\n", "UTF8", "a.csv"),
    "an array": ("a.jsonl", GOOD + b"[1, 2]\n", "JSON array, not an object", "a.jsonl:2"),
    "a string": ("a.jsonl", b'"prompt"\n', "JSON string, not an object", "a.jsonl:1"),
    "a null": ("a.jsonl", b"null\n", "JSON null", "a.jsonl:1"),
    "blank in the middle": ("a.jsonl", GOOD + b"\n\n" + GOOD, "blank line", "a.jsonl:2"),
    "csv too many fields": ("a.csv", b"prompt,n\na,1\nb,2,3\n", "Row #3: Expected 2 columns, got 3", "a.csv"),
    "csv types change": ("a.csv", b"prompt,n\n" + b"a,1\n" * 1_500_000 + b"b,x\n", "Row #1500002", "after 1"),
    "csv open quote": ("a.csv", b'prompt,n\n"a,1\nb,2\n', "CSV parse error", "a.csv"),
    "csv row too long": ("a.csv", b"prompt,n\na,1\n" + b"x" * 2_000_000 + b",2\n", "block", "a.csv"),
    "double column": ("a.csv", b"prompt,prompt\na,b\n", "two columns are called 'prompt'", "a.csv"),
    "not parquet": ("a.parquet", b"junk" * 10, "Parquet magic bytes", "a.parquet"),
    "not arrow": ("a.arrow", b"junk" * 10, "cannot read", "a.arrow"),
    "cut arrow file": ("a.feather", b"ARROW1\0\0" + b"\1" * 30, "cannot read", "a.feather"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(tmp_path: Path, case: str) -> None:
    name, content, what, where = BAD[case]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        for _ in iter_rows(str(tmp_path / name)):
            pass
    assert what in caught.value.what
    assert where in caught.value.where and str(tmp_path) in caught.value.where
    assert caught.value.fix


def test_folder_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(UserError, match="directory"):
        next(iter_rows(str(tmp_path / "d.jsonl")))


def test_cut_parquet_and_bad_text_in_parquet(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    strings = pa.array([b"fine"] * 299 + [b"\xff"], pa.binary()).cast(pa.string(), safe=False)
    pa.parquet.write_table(pa.table({"prompt": strings}), path)
    with pytest.raises(UserError, match="not UTF-8") as caught:
        list(iter_rows(str(path)))
    assert caught.value.where == f"{path}, row 300"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="cannot read"):
        list(iter_rows(str(path)))


def test_rows_before_a_fault_are_given(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD * 3 + b"oops\n")
    assert len(list(islice(iter_rows(str(tmp_path / "a.jsonl")), 3))) == 3


def test_place() -> None:
    assert place("d/a.jsonl.gz", 4) == "d/a.jsonl.gz:5"
    assert place("a.parquet", 4) == "a.parquet, row 5"


@pytest.mark.parametrize("name", ["big.jsonl", "big.jsonl.gz"])
def test_json_lines_stream_in_bounded_memory(tmp_path: Path, name: str) -> None:
    line = json.dumps({"prompt": "x" * 1000, "n": [1, 2, 3]}).encode() + b"\n"
    data = line * 20_000  # 20 MB
    (tmp_path / name).write_bytes(gzip.compress(data, 1) if name.endswith("gz") else data)
    del data
    pool = pa.default_memory_pool()
    before, peak = pool.bytes_allocated(), 0
    tracemalloc.start()
    for number, _ in iter_rows(str(tmp_path / name)):
        if number % 1000 == 0:
            peak = max(peak, pool.bytes_allocated() - before)
    python_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number == 19_999
    assert python_peak < 4e6 and peak < 4e6


@pytest.mark.parametrize("name", ["big.parquet", "big.arrow", "big.feather", "big.csv"])
def test_tables_stream_in_bounded_memory(tmp_path: Path, name: str) -> None:
    batch = pa.record_batch({"prompt": [f"{i:06d}" + "x" * 1000 for i in range(2000)], "n": list(range(2000))})
    path, batches = str(tmp_path / name), 40  # 80 MB
    if name.endswith("parquet"):
        with pa.parquet.ParquetWriter(path, batch.schema, compression="NONE", use_dictionary=False) as writer:
            for _ in range(batches):
                writer.write_batch(batch)
    elif name.endswith("csv"):
        with pa.csv.CSVWriter(path, batch.schema) as writer:
            for _ in range(batches):
                writer.write_batch(batch)
    else:
        new = pa.ipc.new_stream if name.endswith("arrow") else pa.ipc.new_file
        with new(path, batch.schema) as writer:
            for _ in range(batches):
                writer.write_batch(batch)
    del batch
    pool = pa.default_memory_pool()
    before, peak = pool.bytes_allocated(), 0
    tracemalloc.start()
    for number, _ in iter_rows(path):
        if number % 100 == 0:
            peak = max(peak, pool.bytes_allocated() - before)
    python_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number == 79_999
    assert python_peak < 4e6
    assert peak < 30e6


def test_a_csv_reader_given_up_early_takes_nothing_from_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow's CSV reader reads ahead in a thread: close its file, and the thread reads from whatever gets the descriptor next."""
    path = tmp_path / "a.csv"
    path.write_text("prompt,n\n" + "".join(f"{'x' * 1000},{i}\n" for i in range(3000)))
    opened: list[pa.NativeFile] = []
    open_stream = files._open
    monkeypatch.setattr(files, "_open", lambda *a: opened.append(open_stream(*a)) or opened[-1])
    for _ in range(10):
        early = iter_rows(str(path))
        assert next(early)[0] == 0
        early.close()
        assert sum(row["n"] for _, row in iter_rows(str(path))) == 3000 * 2999 // 2
    assert opened and not any(stream.closed for stream in opened)


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared data folder is not here")
def test_real_files() -> None:
    paths = sorted(p for p in (SHARED / "data").glob("*/*") if p.name.endswith((".jsonl", ".jsonl.gz")))
    counts = {p.name: sum(1 for _ in iter_rows(str(p))) for p in paths}
    assert counts == {
        "test.jsonl": 1319,
        "harmless-base-test.jsonl.gz": 2312,
        "helpful-base-test.jsonl.gz": 2354,
        "question.jsonl": 80,
        "pairs.derived.jsonl": 212,
        "seed_tasks.jsonl": 175,
    }


def test_rows_that_cannot_be_read_are_yielded_as_errors_and_the_next_ones_follow(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "a"}\nnot json\n\n{"prompt": "\xff"}\n{"prompt": "b"}\n\n')
    rows = list(iter_rows_and_errors(str(path)))
    assert [number for number, _ in rows] == [0, 1, 2, 3, 4]
    assert [row.where for _, row in rows if isinstance(row, UserError)] == [f"{path}:{line}" for line in (2, 3, 4)]
    assert [row["prompt"] for _, row in rows if not isinstance(row, UserError)] == ["a", "b"]
