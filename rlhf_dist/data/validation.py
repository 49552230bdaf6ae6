"""Rows of files as typed records, each good or with its fault, and the policy for faulty ones.

One layout a file: it is told from the first rows, or given. Only one row is held (and the first ones, while the layout is told).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rlhf_dist.config.errors import UserError
from rlhf_dist.data.chat import RefusedChat, render
from rlhf_dist.data.faults import RowFault
from rlhf_dist.data.files import Row, iter_rows_and_errors, place
from rlhf_dist.data.layouts import LAYOUTS, TEXT_ROLES, Layout, Origin, Record, compatible, detect, has_mark, names_with
from rlhf_dist.data.parsing import parse

ErrorPolicy = Literal["error", "drop"]

DETECTION_ROWS = 64


@dataclass(frozen=True)
class Reading:
    """How to read files: their layout (told from the rows where it is None), and {part: column} where names are the user's own."""

    layout: Layout | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TypedRow:
    """A row of a file, number from 0: its record, or its fault; `row` is empty where it could not be read."""

    file: str
    number: int
    layout: Layout
    row: Row
    record: Record | None
    fault: RowFault | None


@dataclass
class ReadCounts:
    """What became of the rows read; `other_split` counts rows held out, or not."""

    rows: int = 0
    accepted: int = 0
    other_split: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """One line for people, with every reason."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        parts = [f"{self.accepted} of {self.rows} rows accepted"]
        parts += [f"{self.other_split} in the other split"] if self.other_split else []
        parts += [f"{self.dropped.total()} dropped ({reasons})"] if reasons else []
        return ", ".join(parts)


def typed_rows(path: str, reading: Reading = Reading()) -> Iterator[TypedRow]:
    """Every row of a file, in order, good or faulty.

    Raises:
        UserError: the file cannot be read (to its end), or its layout cannot be told.
    """
    names = names_with(reading.columns)
    text_columns = [name for part in TEXT_ROLES for name in names[part]]
    rows = iter_rows_and_errors(path, text_columns=text_columns)
    layout, rows = (reading.layout, rows) if reading.layout else _told(path, rows, names)
    forced, source = reading.layout is not None, Path(path).name.removesuffix(".gz").rpartition(".")[0]
    for number, row in rows:
        origin = Origin(path, number, source)
        if isinstance(row, UserError):
            fault = RowFault("unreadable row", row.what, where=row.where)
            yield TypedRow(path, number, layout, {}, None, fault)
        elif not forced and not compatible(row, layout, names):
            detail = f"the layout changes: the file began with {layout}, and this row is one of {detect(row, names)}"
            yield TypedRow(path, number, layout, row, None, RowFault("mixed layouts", detail, where=origin.where))
        else:
            yield _typed(row, layout, origin, names)


def _typed(row: Row, layout: Layout, origin: Origin, names: Mapping[str, tuple[str, ...]]) -> TypedRow:
    try:
        return TypedRow(origin.file, origin.row, layout, row, parse(row, layout, origin, names), None)
    except RowFault as fault:
        return TypedRow(origin.file, origin.row, layout, row, None, fault)


def _told(
    path: str, rows: Iterator[tuple[int, Row | UserError]], names: Mapping[str, tuple[str, ...]]
) -> tuple[Layout, Iterator[tuple[int, Row | UserError]]]:
    first = list(itertools.islice(rows, DETECTION_ROWS))
    readable = [row for _, row in first if not isinstance(row, UserError)]
    found = [layout for row in readable if (layout := detect(row, names)) is not None]
    if not found:
        if not readable:
            raise next(row for _, row in first if isinstance(row, UserError))
        columns = ", ".join(readable[0]) or "none"
        raise UserError(
            f"cannot tell the layout of the file (columns: {columns})",
            where=place(path, 0),
            fix=f"name the columns as one of the layouts has them ({', '.join(LAYOUTS)}), or say which column is which part",
        )
    # A first row that lost its answers is a faulty row of the layout of the next ones, not the start of a file of prompts.
    fuller = next((layout for layout in found if layout != "prompts"), found[0])
    lost = found[0] == "prompts" and all(
        has_mark(row, fuller, names) for row in itertools.takewhile(lambda row: detect(row, names) != fuller, readable)
    )
    return fuller if lost else found[0], itertools.chain(first, rows)


def accepted(rows: Iterable[TypedRow], counts: ReadCounts, errors: ErrorPolicy) -> Iterator[tuple[TypedRow, Record]]:
    """The good rows with their records; faulty ones stop the reading or are dropped and counted, as `errors` says.

    Raises:
        UserError: a faulty row under `error`, named by file and line; a second layout in one file under either policy.
    """
    for typed in rows:
        counts.rows += 1
        if typed.record is not None:
            counts.accepted += 1
            yield typed, typed.record
        elif typed.fault is not None:
            if typed.fault.reason == "mixed layouts":
                raise typed.fault.as_error(may_drop=False)
            if errors == "error":
                raise typed.fault.as_error()
            counts.dropped[typed.fault.reason] += 1


def require_layout(typed: TypedRow, wanted: Collection[Layout], what: str, fix: str) -> None:
    """Refuses a file of another kind, at its first row.

    Raises:
        UserError: the file's layout is not among `wanted`.
    """
    if typed.layout not in wanted:
        raise UserError(f"the file holds {typed.layout}, not {what}", where=typed.file, fix=fix)


def faults(
    files: Sequence[str], reading: Reading, counts: ReadCounts, tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[RowFault | UserError]:
    """Every fault of every file: rows in order, then the file's own, where it could not be read to the end.

    Args:
        tokenizer: its chat template is tried on every chat; one that is missing or broken is a fault of the file.
    """
    for path in files:
        try:
            for typed in typed_rows(path, reading):
                fault = typed.fault or _refused(typed.record, tokenizer)
                counts.rows += 1
                counts.accepted += fault is None
                if fault is not None:
                    counts.dropped[fault.reason] += 1
                    yield fault
        except UserError as error:
            yield error


def _refused(record: Record | None, tokenizer: PreTrainedTokenizerBase | None) -> RowFault | None:
    if record is None or tokenizer is None or isinstance(record.prompt, str):
        return None
    try:
        render(record.prompt, tokenizer, where=record.origin.where, ask=True)
    except RefusedChat as error:
        return RowFault("refused by the chat template", error.what, where=error.where)
    return None
