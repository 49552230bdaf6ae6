"""Readers of typed records: files in order, the policy for faulty rows, and one side of the split by prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rlhf_dist.config.errors import UserError
from rlhf_dist.data.layouts import Layout, Record
from rlhf_dist.data.splitting import Split, side
from rlhf_dist.data.validation import ErrorPolicy, ReadCounts, Reading, accepted, require_layout, typed_rows


@dataclass(frozen=True)
class ReadOptions:
    """How records are read.

    errors: what a faulty row does; drops are counted by reason.
    split: which side of the split by prompt; None reads all. eval_fraction: share of prompts held out.
    layout: of all files, where it shall not be told from the rows. columns: {part: column}.
    """

    errors: ErrorPolicy = "error"
    split: Split | None = None
    eval_fraction: float = 0.0
    layout: Layout | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def reading(self) -> Reading:
        """Layout and columns."""
        return Reading(self.layout, self.columns)


READ_ALL = ReadOptions()
"""All rows; a faulty one stops."""


class RecordReader:
    """Records of files, in order, one pass an iteration; `counts` are those of the latest pass.

    Args:
        files: read one after another; each may have a layout of its own, among those that the subclass wants.
        options: policy and split.

    Raises:
        UserError: (while iterating) a faulty row under `error`, mixed or unwanted layouts, or nothing left.
    """

    wanted: tuple[Layout, ...] = ()
    what = "records"
    fix = ""

    def __init__(self, files: Sequence[str], options: ReadOptions = READ_ALL) -> None:
        if not files:
            raise ValueError("a reader needs at least one file")
        self._files, self._options = tuple(files), options
        self.counts = ReadCounts()

    def records(self) -> Iterator[Record]:
        """All records of the split."""
        self.counts = counts = ReadCounts()
        options = self._options
        for path in self._files:
            for typed, record in accepted(typed_rows(path, options.reading), counts, options.errors):
                require_layout(typed, self.wanted, self.what, self.fix)
                if options.split and side(record, options.eval_fraction) != options.split:
                    counts.accepted -= 1
                    counts.other_split += 1
                    continue
                yield record
        if not counts.accepted:
            raise self._nothing(counts)

    def _nothing(self, counts: ReadCounts) -> UserError:
        split = f" of the {self._options.split} split" if self._options.split else ""
        return UserError(
            f"no row{split} is left: {counts.summary()}",
            where=", ".join(self._files),
            fix="mend the rows (`rlhf-dist data validate` lists them), or change the share held out",
        )
