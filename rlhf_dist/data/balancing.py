"""No kind of feedback dominates: at most N rows of each group, or weights that give each group the same total.

Two passes: the first counts (and, for a cap, keeps 8 bytes a row), the second chooses or weighs. Nothing depends on the order of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from rlhf_dist.config.errors import UserError
from rlhf_dist.data.layouts import PreferencePair, Ranking, Record
from rlhf_dist.data.records import stable_hash
from rlhf_dist.data.sketches import Column
from rlhf_dist.data.validation import TypedRow

MAX_GROUPS = 10_000
NO_LABEL = "(none)"

GoodRow = tuple[TypedRow, Record]


@dataclass(frozen=True)
class Grouping:
    """By what rows are grouped: `source`, `label`, or the name of a column."""

    by: str

    def of(self, typed: TypedRow, record: Record) -> str:
        """The group of a row.

        The label is the preferred place of a labelled pair (a, b, tie), the place of the best answer of a ranking, and otherwise
        what the column `label` says.

        Raises:
            UserError: grouped by a column that the row does not have.
        """
        if self.by == "source":
            return record.origin.source
        if self.by == "label":
            return _label(typed, record)
        if self.by not in typed.row:
            columns = ", ".join(typed.row)
            raise UserError(
                f"the row has no column {self.by!r} (its columns: {columns})",
                where=record.origin.where,
                fix="group by source, by label, or by a column of all rows",
            )
        return str(typed.row[self.by])


def group_counts(rows: Iterable[GoodRow], grouping: Grouping) -> dict[str, int]:
    """Rows of each group.

    Raises:
        UserError: more than 10,000 groups: grouped by something that names rows, not kinds.
    """
    counts: dict[str, int] = {}
    for typed, record in rows:
        group = grouping.of(typed, record)
        if group not in counts and len(counts) == MAX_GROUPS:
            raise _too_many(grouping, record)
        counts[group] = counts.get(group, 0) + 1
    return counts


def weights(counts: Mapping[str, int]) -> dict[str, float]:
    """The weight of a row of each group: each group has the same total, and the mean over all rows is 1."""
    total = sum(counts.values())
    return {group: total / (len(counts) * count) for group, count in counts.items()}


def weighted(rows: Iterable[GoodRow], grouping: Grouping, group_weights: Mapping[str, float]) -> Iterator[tuple[GoodRow, float]]:
    """Each row with its weight, times the one that it had."""
    for typed, record in rows:
        yield (typed, record), group_weights[grouping.of(typed, record)] * record.weight


def capped(passes: Callable[[], Iterable[GoodRow]], grouping: Grouping, cap: int, seed: int) -> Iterator[GoodRow]:
    """At most `cap` rows of each group, in order.

    Which ones is drawn by a hash of seed, file and row: uniform, and the same in every run.

    Args:
        passes: starts a pass over the rows; called twice.
        cap: rows kept of a group, at least 1.

    Raises:
        UserError: more than 10,000 groups.
    """
    if cap < 1:
        raise ValueError("a cap keeps at least one row of each group")
    draws: dict[str, Column[np.uint64]] = {}
    for typed, record in passes():
        group = grouping.of(typed, record)
        if group not in draws and len(draws) == MAX_GROUPS:
            raise _too_many(grouping, record)
        draws.setdefault(group, Column(np.uint64)).append(_draw(record, seed))
    limits = {group: _limit(column, cap) for group, column in draws.items()}
    for typed, record in passes():
        if _draw(record, seed) <= limits[grouping.of(typed, record)]:
            yield typed, record


def _limit(column: Column[np.uint64], cap: int) -> int:
    hashes = column.take()
    if len(hashes) <= cap:
        return 2**64
    hashes.partition(cap - 1)
    return int(hashes[cap - 1])


def _draw(record: Record, seed: int) -> int:
    return stable_hash(f"cap\0{seed}\0{record.origin.file}\0{record.origin.row}")


def _label(typed: TypedRow, record: Record) -> str:
    if isinstance(record, PreferencePair) and record.preferred:
        return record.preferred
    if isinstance(record, Ranking) and record.positions:
        return f"best at {record.positions[0] + 1}"
    label = typed.row.get("label")
    return NO_LABEL if label is None else str(label)


def _too_many(grouping: Grouping, record: Record) -> UserError:
    return UserError(
        f"more than {MAX_GROUPS} groups by {grouping.by!r}",
        where=record.origin.where,
        fix="group by what names a kind of row, not the row",
    )
