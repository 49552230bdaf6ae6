"""Rows of data files as Python dicts, streamed through pyarrow: JSON lines, CSV (both also gzipped), Parquet, Arrow IPC.

Only one batch (or line) is held at a time. JSON lines are parsed line by line from pyarrow's (decompressed) stream and not by
`pyarrow.json`, which wants one schema for the whole file: rows may differ in their keys and types, and an error names its line.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet

from rlhf_dist.config.errors import UserError

Row = dict[str, Any]

BATCH_ROWS = 256
CSV_BLOCK_BYTES = 1 << 19  # a row must fit into a block, and pyarrow reads up to 32 of them ahead
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".json-lines", ".json")
ARROW = (".arrow", ".feather", ".ipc")
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
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"cannot read the file: {_first_line(error)}", where=_place_after(path, count), fix=_remedy(suffix, gzipped)
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
        for number, line in enumerate(lines, start=1):
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
        row = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
        if b"\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair parses, but is no text
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        gzip = " (the file looks gzipped: name it .gz)" if first and line[:2] == b"\x1f\x8b" else ""
        raise UserError(f"not UTF-8 text: {error.reason}{gzip}", where=where, fix="convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"not a JSON line: {error}", where=where, fix="write one complete JSON object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"the row is a JSON {_json_kind(row)}, not an object", where=where, fix='write {"prompt": …} on each line')
    return row


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
    except UnicodeDecodeError as error:
        if batch.num_rows > 1:  # find the one
            return [row for i in range(batch.num_rows) for row in _to_python(batch.slice(i, 1), path, first_row + i)]
        return [UserError(f"not UTF-8 text: {error.reason}", where=place(path, first_row), fix="write the column as UTF-8")]


def _csv_batches(path: str, gzipped: bool, text_columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    types = {field.name: _csv_type(field) for field in _csv_reader(path, gzipped, dict.fromkeys(text_columns, pa.string())).schema}
    yield from _csv_reader(path, gzipped, types)


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
        yield from file.iter_batches(batch_size=BATCH_ROWS, use_threads=False)


def _arrow_batches(path: str) -> Iterator[pa.RecordBatch]:
    """The IPC file format has its magic at the start; what `datasets` writes is the stream format, without one."""
    with pa.memory_map(path) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pa.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from pa.ipc.open_stream(source)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _remedy(suffix: str, gzipped: bool) -> str:
    if gzipped:
        return "the archive is damaged, cut short or not gzip: write it again"
    if suffix == ".csv":
        return "mend the row (one type a column, quotes closed, UTF-8), or use .jsonl"
    return "check that the file is complete and is what its ending says"
