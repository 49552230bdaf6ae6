"""Rows into files: JSON lines and CSV (both also gzipped) and Parquet, by the ending; a file appears whole or not at all."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Iterable
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet

from rlhf_dist.config.errors import UserError
from rlhf_dist.data.files import BATCH_ROWS, Row

WRITABLE = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")


def writable_ending(path: str | Path) -> str:
    """The ending that says the format.

    Raises:
        UserError: another one.
    """
    name = Path(path).name.lower()
    ending = next((ending for ending in WRITABLE if name.endswith(ending)), None)
    if ending is None:
        raise UserError("cannot tell which format to write", where=str(path), fix=f"end the name with one of {', '.join(WRITABLE)}")
    return ending


def refuse_overwriting(output: str | Path, inputs: Iterable[str]) -> None:
    """Refuses to write over a file that is read.

    Raises:
        UserError: the output is one of the inputs.
    """
    if any(Path(output).resolve() == Path(path).resolve() for path in inputs):
        raise UserError("the output is one of the inputs", where=str(output), fix="write to another file")


class RowWriter:
    """Writes rows one by one; a context: leaving it well puts the file in its place, leaving it with an error leaves nothing.

    Args:
        path: its ending says the format; its folder is made.

    Raises:
        UserError: unknown ending; on writing, a row whose columns or types the format cannot hold.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.rows = Path(path), 0
        self._ending = writable_ending(path)
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")

    def __enter__(self) -> RowWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._ending == ".parquet":
            self._format: _Parquet | _Csv | _JsonLines = _Parquet(self._partial, str(self.path))
        else:
            stream = _TextFile(self._partial, gzipped=self._ending.endswith(".gz"))
            self._format = (_Csv if self._ending.startswith(".csv") else _JsonLines)(stream, str(self.path))
        return self

    def write(self, row: Row) -> None:
        """Adds a row."""
        self._format.write(row)
        self.rows += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._format.close(complete=kind is None)
            if kind is None:
                os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)


class _TextFile:
    """UTF-8 text, gzipped perhaps; without name and time in the archive, so that the same rows give the same bytes."""

    def __init__(self, path: Path, *, gzipped: bool) -> None:
        self._raw = path.open("wb")
        packed = gzip.GzipFile(filename="", fileobj=self._raw, mode="wb", mtime=0) if gzipped else self._raw
        self.text = io.TextIOWrapper(packed, encoding="utf-8", newline="")

    def close(self) -> None:
        try:
            self.text.close()
        finally:
            self._raw.close()


class _JsonLines:
    def __init__(self, stream: _TextFile, path: str) -> None:
        self._stream, self._path = stream, path

    def write(self, row: Row) -> None:
        self._stream.text.write(json.dumps(row, ensure_ascii=False, default=self._plain) + "\n")

    def _plain(self, value: object) -> str:
        if isinstance(value, (date, time)):
            return value.isoformat()
        if isinstance(value, Decimal):
            return str(value)
        raise UserError(f"JSON cannot hold {type(value).__name__}", where=self._path, fix="write .parquet, or leave the column out")

    def close(self, *, complete: bool) -> None:
        self._stream.close()


class _Csv:
    def __init__(self, stream: _TextFile, path: str) -> None:
        self._stream, self._path = stream, path
        self._writer: csv.DictWriter[str] | None = None

    def write(self, row: Row) -> None:
        if self._writer is None:
            self._writer = csv.DictWriter(self._stream.text, list(row))
            self._writer.writeheader()
        nested = next((name for name, value in row.items() if isinstance(value, (list, dict))), None)
        if nested is not None:
            raise UserError(f"CSV cannot hold the lists of column {nested!r}", where=self._path, fix="write .jsonl or .parquet")
        if set(row) - set(self._writer.fieldnames):
            raise UserError("rows differ in their columns, which CSV cannot hold", where=self._path, fix="write .jsonl")
        self._writer.writerow(row)

    def close(self, *, complete: bool) -> None:
        self._stream.close()


class _Parquet:
    def __init__(self, partial: Path, path: str) -> None:
        self._partial, self._path = partial, path
        self._writer: pyarrow.parquet.ParquetWriter | None = None
        self._pending: list[Row] = []
        self._written = 0

    def write(self, row: Row) -> None:
        self._pending.append(row)
        if len(self._pending) >= BATCH_ROWS * 4:
            self._flush()

    def _flush(self) -> None:
        columns = list(dict.fromkeys(name for row in self._pending for name in row))
        try:
            table = pa.table({name: [row.get(name) for row in self._pending] for name in columns})
            if self._writer is None:
                self._writer = pyarrow.parquet.ParquetWriter(self._partial, table.schema)
            # Only a schema that the first rows' already covers: pyarrow would drop new columns, and new keys of messages, in silence.
            if pa.unify_schemas([self._writer.schema, table.schema], promote_options="permissive") != self._writer.schema:
                raise self._mixed(f"first {self._writer.schema.names}, now {table.schema.names}, or keys or types within them")
            self._writer.write_table(pa.Table.from_pylist(self._pending, schema=self._writer.schema))
        except pa.ArrowException as error:
            raise self._mixed(str(error)) from None
        self._written += len(self._pending)
        self._pending.clear()

    def _mixed(self, detail: str) -> UserError:
        where = f"{self._path}, rows {self._written + 1} to {self._written + len(self._pending)}"
        return UserError(f"the rows change their columns or types, which Parquet cannot hold: {detail}", where=where, fix="write .jsonl")

    def close(self, *, complete: bool) -> None:
        try:
            if complete and (self._pending or self._writer is None):
                self._flush()
        finally:
            if self._writer is not None:
                self._writer.close()
