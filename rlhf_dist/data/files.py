"""Rows of data files as Python dicts, streamed through pyarrow: JSON lines, CSV (both also gzipped), Parquet, Arrow IPC.

Only one batch (or line) is held at a time. JSON lines are parsed line by line from pyarrow's (decompressed) stream and not by
`pyarrow.json`, which wants one schema for the whole file: rows may differ in their keys and types, and an error names its line.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet

from rlhf_dist.config.errors import UserError, first_line

Row = dict[str, Any]

BATCH_ROWS = 256
CSV_BLOCK_BYTES = 1 << 19  # a row must fit into a block, and pyarrow reads up to 32 of them ahead
LINE_BYTES = 1 << 26  # a line must fit into memory, whatever an archive unpacks to
DEEPEST = 100  # levels of a row: far below where Python's recursion ends, which copies and messages of the row run into
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".json-lines", ".json")
ARROW = (".arrow", ".feather", ".ipc")
# What pyarrow and zlib raise at files that are not what they say; ValueError is also text that is not UTF-8, and names with NUL bytes.
DAMAGE = (OSError, EOFError, ValueError, LookupError, OverflowError, MemoryError, NotImplementedError, zlib.error, pa.ArrowException)
READABLE = ".jsonl, .csv (each also as .gz), .parquet, .arrow, .feather"


def iter_rows(path: str, *, text_columns: Sequence[str] = ()) -> Iterator[tuple[int, Row]]:
    """Streams the rows of one file.

    CSV has no types: columns that read as whole numbers, decimals or booleans at the start of the file become that, the others
    (dates too) stay text; an empty text field is "", an empty number None. All other formats keep their types.

    Args:
        path: local file; its ending says the format.
        text_columns: CSV columns that stay text whatever they look like.

    Yields:
        Row number from 0 (blank lines at the end of JSON lines do not count) and the row.

    Raises:
        UserError: missing or unreadable file, unknown ending, no rows, or a row that cannot be read, named by file and line.
    """
    for number, row in iter_rows_and_errors(path, text_columns=text_columns):
        if isinstance(row, UserError):
            raise row
        yield number, row


def iter_rows_and_errors(path: str, *, text_columns: Sequence[str] = ()) -> Iterator[tuple[int, Row | UserError]]:
    """As `iter_rows`, but a row that cannot be read is yielded as its error and the next ones follow, where the format allows it.

    JSON lines can go on after a line that is not UTF-8, not JSON or blank; binary tables after text that is not UTF-8. A faulty CSV
    row, and an archive that is cut short, still end the file.

    Raises:
        UserError: missing or damaged file, unknown ending, no rows, or a CSV row that cannot be read.
    """
    suffix, gzipped = _suffix(path)
    count = 0
    try:
        for row in _reader(suffix, gzipped, path, tuple(text_columns)):
            yield count, row
            count += 1
    except FileNotFoundError:
        raise UserError("the data file does not exist", where=path, fix=f"check the path (relative to {Path.cwd()})") from None
    except DAMAGE as error:
        raise UserError(
            f"cannot read the file: {first_line(error)}", where=_place_after(path, count), fix=_remedy(suffix, gzipped)
        ) from None
    if not count:
        raise UserError("the data file has no rows", where=path, fix="give a file with at least one row")


def place(path: str, row: int) -> str:
    """Where a row stands, as people look for it: file:line for JSON lines, file and row for the others (both from 1)."""
    return f"{path}:{row + 1}" if _is_lines(path) else f"{path}, row {row + 1}"


def _is_lines(path: str) -> bool:
    return path.lower().removesuffix(".gz").endswith(JSON_LINES)


def _place_after(path: str, count: int) -> str:
    return f"{path}:{count + 1}" if _is_lines(path) else f"{path}, after {count} rows" if count else path


def _suffix(path: str) -> tuple[str, bool]:
    name = Path(path).name.lower()
    gzipped = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix
    known = (*JSON_LINES, ".csv") if gzipped else (*JSON_LINES, ".csv", ".parquet", *ARROW)
    if suffix not in known:
        ending = (suffix + ".gz" if gzipped else suffix) or "no ending"
        raise UserError(f"cannot tell the format of the data file ({ending})", where=path, fix=f"use one of {READABLE}")
    return suffix, gzipped


def _reader(suffix: str, gzipped: bool, path: str, text_columns: tuple[str, ...]) -> Iterator[Row | UserError]:
    if suffix in JSON_LINES:
        return _json_rows(path, gzipped)
    if suffix == ".csv":
        return _table_rows(path, lambda: _csv_batches(path, gzipped, text_columns))
    return _table_rows(path, lambda: _parquet_batches(path) if suffix == ".parquet" else _arrow_batches(path))


def _open(path: str, gzipped: bool) -> pa.NativeFile:
    return pa.input_stream(path, compression="gzip" if gzipped else None)


def _json_rows(path: str, gzipped: bool) -> Iterator[Row | UserError]:
    blanks = 0
    with _open(path, gzipped) as stream, io.BufferedReader(stream, 1 << 20) as lines:
        for number, line in enumerate(iter(lambda: lines.readline(LINE_BYTES), b""), start=1):
            if len(line) == LINE_BYTES and not line.endswith(b"\n"):
                what = f"the line is longer than {LINE_BYTES >> 20} MiB"
                raise UserError(what, where=f"{path}:{number}", fix="write one row a line; a longer text is no row to train on")
            if not line.strip():
                blanks += 1
                continue
            yield from (_blank(f"{path}:{gap}") for gap in range(number - blanks, number))
            blanks = 0
            yield _row_or_error(line, f"{path}:{number}", first=number == 1)


def _row_or_error(line: bytes, where: str, *, first: bool) -> Row | UserError:
    try:
        return _parse(line, where, first=first)
    except UserError as error:
        return error


def _blank(where: str) -> UserError:
    return UserError("a blank line between rows", where=where, fix="remove it; only the end of the file may be blank")


def _parse(line: bytes, where: str, *, first: bool) -> Row:
    try:
        row = _DECODER.decode(line.decode("utf-8-sig" if first else "utf-8"))
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair parses, but is no text
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        gzip = " (the file looks gzipped: name it .gz)" if first and line[:2] == b"\x1f\x8b" else ""
        raise UserError(f"not UTF-8 text: {error.reason}{gzip}", where=where, fix="convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"not a JSON line: {error}", where=where, fix="write one complete JSON object a line") from None
    if line.count(b"{") + line.count(b"[") > DEEPEST and _depth(row) > DEEPEST:
        raise UserError(f"the row is nested more than {DEEPEST} levels deep", where=where, fix="write it flatter, or as text")
    if not isinstance(row, dict):
        raise UserError(f"the row is a JSON {_json_kind(row)}, not an object", where=where, fix='write {"prompt": …} on each line')
    return row


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON leaves open which of two values counts; Python would take the last and drop the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in found if names.count(name) > 1)!r} comes twice")
    return found


def _finite(text: str) -> float:
    """JSON has no NaN and no infinity; Python reads both, and makes one of 1e999."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is no finite number")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_each_once, parse_float=_finite, parse_constant=_finite)


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [
        inner for each in level if isinstance(each, dict | list) for inner in (each.values() if isinstance(each, dict) else each)
    ]:
        depth += 1
    return depth


def _json_kind(value: object) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _table_rows(path: str, batches: Callable[[], Iterator[pa.RecordBatch]]) -> Iterator[Row | UserError]:
    row = 0
    for batch in batches():
        _refuse_double_columns(batch.schema.names, path)
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield from _to_python(batch.slice(start, BATCH_ROWS), path, row + start)
        row += batch.num_rows


def _refuse_double_columns(names: list[str], path: str) -> None:
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise UserError(f"two columns are called {doubles[0]!r}", where=path, fix="rename one")


def _to_python(batch: pa.RecordBatch, path: str, first_row: int) -> list[Row | UserError]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError, LookupError, pa.ArrowException) as error:
        if batch.num_rows > 1:  # find the one
            return [row for i in range(batch.num_rows) for row in _to_python(batch.slice(i, 1), path, first_row + i)]
        if isinstance(error, UnicodeDecodeError):
            return [UserError(f"not UTF-8 text: {error.reason}", where=place(path, first_row), fix="write the column as UTF-8")]
        what = f"a value that cannot be read: {first_line(error)}"  # a date of the year 300000, a time zone that nobody knows
        return [UserError(what, where=place(path, first_row), fix="write the column as text or numbers")]


def _csv_batches(path: str, gzipped: bool, text_columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    types = {field.name: _csv_type(field) for field in _csv_reader(path, gzipped, dict.fromkeys(text_columns, pa.string())).schema}
    rows = _csv_strictly(path, gzipped)
    next(rows, None)  # the column names
    for batch in _csv_reader(path, gzipped, types):
        if len(list(itertools.islice(rows, batch.num_rows))) < batch.num_rows:
            raise pa.ArrowInvalid("the rows cannot be told apart")
        yield batch
    if next(rows, None) is not None:
        raise pa.ArrowInvalid("the rows cannot be told apart")


def _csv_strictly(path: str, gzipped: bool) -> Iterator[list[str]]:
    """The rows once more, by a reader that minds quotes: pyarrow lets one that is never closed swallow the rest of the file, and joins
    what follows a closed one to it.

    Raises:
        UserError: quotes that do not match, or a NUL (text in UTF-16 is full of them); text that is not UTF-8 is pyarrow's to refuse.
    """
    csv.field_size_limit(max(csv.field_size_limit(), CSV_BLOCK_BYTES))  # of the whole process, so never made smaller
    number = -1
    with (gzip.open if gzipped else open)(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        try:
            for row in csv.reader(lines, strict=True):
                if any("\0" in cell for cell in row):
                    raise csv.Error("line contains NUL")
                if row:
                    yield row
                    number += 1
        except csv.Error as error:
            fix = "write the file as UTF-8; close each quote, and double those inside quoted text"
            raise UserError(f"CSV parse error: {error}", where=place(path, number + 1), fix=fix) from None


def _csv_type(field: pa.Field) -> pa.DataType:
    kept = pa.types.is_integer(field.type) or pa.types.is_floating(field.type) or pa.types.is_boolean(field.type)
    return field.type if kept else pa.string()


def _csv_reader(path: str, gzipped: bool, types: dict[str, pa.DataType]) -> pa.csv.CSVStreamingReader:
    """The reader owns its stream, and nobody else may close it.

    Its thread reads ahead: closing the stream under it frees the file descriptor, and the thread then eats bytes of the file
    that is opened next. Rows were lost that way.
    """
    return pa.csv.open_csv(
        _open(path, gzipped),
        read_options=pa.csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES),  # without threads errors name their row
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(column_types=types),
    )


def _parquet_batches(path: str) -> Iterator[pa.RecordBatch]:
    with pa.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:  # a row group is read as it is needed
        _refuse_double_columns(file.schema_arrow.names, path)
        yield from map(_sound, file.iter_batches(batch_size=BATCH_ROWS, use_threads=False))


def _arrow_batches(path: str) -> Iterator[pa.RecordBatch]:
    """The IPC file format has its magic at the start; what `datasets` writes is the stream format, without one."""
    with pa.memory_map(path) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pa.ipc.open_file(source)
            yield from (_sound(reader.get_batch(i)) for i in range(reader.num_record_batches))
        else:
            yield from map(_sound, pa.ipc.open_stream(source))


def _sound(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Offsets and indices that point outside their data would read foreign memory, or none. Text is looked at row by row, later.

    Raises:
        pa.ArrowInvalid: damaged.
    """
    for column in batch.columns:
        kind = _as_bytes(column.type)
        (column if kind == column.type else column.view(kind)).validate(full=True)
    return batch


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """The type with text as bytes, where lists and structs of it can be looked at so."""
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_as_bytes(kind.value_type)))
    return kind


def _remedy(suffix: str, gzipped: bool) -> str:
    if gzipped:
        return "the archive is damaged, cut short or not gzip: write it again"
    if suffix == ".csv":
        return "mend the row (one type a column, quotes closed, UTF-8), or use .jsonl"
    return "check that the file is complete and is what its ending says"
