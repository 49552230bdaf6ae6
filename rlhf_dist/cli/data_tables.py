"""What the `data` verbs show: tables for people, and the list of faults as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from rlhf_dist.data.statistics import Statistics
    from rlhf_dist.data.validation import ReadCounts

SHOWN_SOURCES = 20
TEXT_COLUMNS = ("file", "layout", "reason", "in", "part", "source")


class FaultList:
    """Writes faults to a JSON file as they come, so that their number does not matter; does nothing without a path.

    The file is one object: `faults`, a list of `{where, reason, detail}`, and what `close` is given.
    """

    def __init__(self, path: Path | None) -> None:
        self._stream = path.open("w", encoding="utf-8") if path else None
        self._separator = "\n"
        self._put('{"faults": [')

    def __enter__(self) -> FaultList:
        return self

    def add(self, fault: Mapping[str, str]) -> None:
        """Adds one."""
        self._put(self._separator + json.dumps(fault, ensure_ascii=False))
        self._separator = ",\n"

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Adds the totals beside the list."""
        self._put("\n], " + json.dumps(summary, ensure_ascii=False)[1:] + "\n")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._stream:
            self._stream.close()

    def _put(self, text: str) -> None:
        if self._stream:
            self._stream.write(text)


def print_counts(counts: ReadCounts, damaged: int = 0) -> None:
    """One line, and the faults by reason."""
    print(counts.summary() + (f", {damaged} files could not be read to their end" if damaged else ""))


def print_statistics(report: Statistics) -> None:
    """Files, faults, lengths, balance, repeats and overlaps."""
    console = Console(soft_wrap=True)
    console.print(_files(report))
    if report.faults:
        console.print(_faults(report))
    for title, lengths in (("characters", report.characters), ("tokens", report.tokens)):
        if lengths:
            console.print(_lengths(title, lengths))
    console.print(_sources(report))
    print(f"repeated rows: {report.repeated_rows}")
    print(f"distinct prompts: {report.distinct_prompts}; rows whose prompt nearly repeats another of its file: {report.near_prompts}")
    shared = [overlap for overlap in report.overlaps if overlap.equal or overlap.near]
    if len(shared) < len(report.overlaps):
        print(f"pairs of files that share no prompt: {len(report.overlaps) - len(shared)} of {len(report.overlaps)}")
    for overlap in shared:
        print(f"prompts of {overlap.second} that {overlap.first} has too: {overlap.equal} equal, {overlap.near} nearly equal")
        for first, second in overlap.examples:
            print(f"  {second} is near {first}")


def print_balance(by: str, before: Mapping[str, int], after: Mapping[str, int], weights: Mapping[str, float]) -> None:
    """Groups with their rows before and after, and the weight of a row."""
    table = _table(f"by {by}", by, "rows", "kept", "weight of a row", "share")
    total = sum(after[group] * weights[group] for group in before)
    for group, rows in before.items():
        share = after[group] * weights[group] / total
        table.add_row(group, str(rows), str(after[group]), f"{weights[group]:.4g}", f"{share:.1%}")
    Console(soft_wrap=True).print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in TEXT_COLUMNS else "right", no_wrap=column not in TEXT_COLUMNS, overflow="fold")
    return table


def _files(report: Statistics) -> Table:
    table = _table("files", "file", "layout", "rows", "good", "faulty")
    for file in report.files:
        counts = file.counts
        table.add_row(file.path, file.layout, f"{counts.rows:,}", f"{counts.accepted:,}", f"{counts.dropped.total():,}")
    if len(report.files) > 1:
        faulty = report.faults.total()
        table.add_row("all", "", f"{report.rows:,}", f"{report.rows - faulty:,}", f"{faulty:,}")
    return table


def _faults(report: Statistics) -> Table:
    table = _table("faulty rows by reason (`rlhf-dist data validate` lists them)", "reason", "rows", "in")
    for reason, count in sorted(report.faults.items()):
        files = [f"{file.counts.dropped[reason]} {file.path}" for file in report.files if file.counts.dropped[reason]]
        table.add_row(reason, f"{count:,}", "\n".join(files))
    return table


def _lengths(title: str, lengths: Mapping[str, Mapping[str, float | int]]) -> Table:
    names = ("count", "min", "median", "p90", "max", "mean")
    table = _table(f"lengths in {title}, good rows", "part", *names)
    for part, summary in lengths.items():
        table.add_row(part, *(f"{summary[name]:,}" if name in summary else "" for name in names))
    return table


def _sources(report: Statistics) -> Table:
    labels = sorted({label for counts in report.sources.values() for label in counts} - {"rows"})
    table = _table("balance by source, good rows", "source", "rows", *labels)
    ordered = sorted(report.sources.items(), key=lambda item: -item[1]["rows"])
    for source, counts in ordered[:SHOWN_SOURCES]:
        table.add_row(source, *(f"{counts.get(label, 0):,}" for label in ("rows", *labels)))
    if len(ordered) > SHOWN_SOURCES:
        table.caption = f"{len(ordered) - SHOWN_SOURCES} more sources are in the JSON"
    return table
