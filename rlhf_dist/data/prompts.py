"""The endless, seekable stream of prompts, and a quick look at the files before a run.

A position counts accepted prompts from the start of the run; epochs follow each other. Which prompt stands at a position is a function
of files, config, seed and position, so a resumed run asks for the position it was at and gets what it would have got (law 4).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rlhf_dist.config.data import DataSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.data.files import Row, iter_rows, place
from rlhf_dist.data.records import PromptReader, PromptRecord, SourceFile, source_files, stable_hash
from rlhf_dist.data.shuffle import shuffled

Split = Literal["train", "eval"]

CHECK_ROWS = 2048
SEARCH_ROWS = 10_000


@dataclass
class PromptCounts:
    """What became of the rows read so far in one pass; rows of the other split do not count."""

    accepted: int = 0
    dropped: int = 0
    truncated: int = 0


class PromptStream:
    """The prompts of one split.

    Args:
        section: the `data` section.
        tokenizer: the policy's.
        split: `eval` reads `data.eval`, or the held-out share of `data.train`; its order is always that of the files.
        seed: of the shuffle.
        limit: use only the first n accepted prompts, in file order.

    Raises:
        UserError: held-out prompts are asked for, and the config names none.
    """

    def __init__(
        self, section: DataSection, tokenizer: PreTrainedTokenizerBase, *, split: Split, seed: int, limit: int | None = None
    ) -> None:
        if limit is not None and limit < 1:
            raise ValueError("limit must be at least 1")
        if split == "eval" and not section.eval and not section.eval_fraction:
            raise UserError("there are no held-out prompts", where="data.eval", fix="name files in data.eval, or set data.eval_fraction")
        own_files = split == "eval" and bool(section.eval)
        self._files = source_files(section.eval if own_files else section.train)
        self._fraction = 0.0 if section.eval else section.eval_fraction
        self._reader, self._prompt_field = PromptReader(section, tokenizer), section.prompt_field
        self._split, self._seed, self._limit = split, seed, limit
        self._drops = section.overlong == "drop"
        self._buffer = section.shuffle_buffer if split == "train" else 0
        self._counts = PromptCounts()
        self._epoch_size: int | None = None
        self._position, self._upcoming = 0, self._endless(0)

    @property
    def accepted(self) -> int:
        """Prompts accepted so far in this epoch (with a shuffle buffer, those in the buffer included)."""
        return self._counts.accepted

    @property
    def dropped(self) -> int:
        """Prompts dropped as too long so far in this epoch."""
        return self._counts.dropped

    @property
    def truncated(self) -> int:
        """Prompts cut on the left so far in this epoch."""
        return self._counts.truncated

    def batch(self, start: int, count: int) -> list[PromptRecord]:
        """Prompts `start` to `start + count` of the endless stream.

        Reading on is cheap; going back reads again from the start of an epoch.

        Raises:
            UserError: a bad row, or no row of the files is accepted.
        """
        if start < 0 or count < 0:
            raise ValueError(f"positions start at 0: start={start}, count={count}")
        self._seek(start)
        return [self._next() for _ in range(count)]

    def finite(self) -> Iterator[PromptRecord]:
        """One epoch in file order.

        Raises:
            UserError: a bad row, or no row of the files is accepted.
        """
        self._counts = counts = PromptCounts()
        yield from itertools.islice(self._accepted_rows(counts), self._limit)
        if not counts.accepted:
            raise self._nothing(counts, "")

    def check(self, rows: int = CHECK_ROWS) -> PromptCounts:
        """Reads the first rows of each file, and further (up to `SEARCH_ROWS`) only where none of them is accepted.

        Raises:
            UserError: a bad row among them, or no prompt found.
        """
        counts = PromptCounts()
        for _ in self._accepted_rows(counts, rows):
            pass
        if counts.accepted:
            return counts
        further = PromptCounts()
        if next(self._accepted_rows(further, SEARCH_ROWS), None) is None:
            raise self._nothing(further, f" in the first {SEARCH_ROWS} rows of each file")
        return further

    def _seek(self, position: int) -> None:
        if position < self._position:
            self._restart(position)
        while self._position < position:
            if self._epoch_size and position - self._position > self._epoch_size:
                self._restart(position)
            else:
                self._next()

    def _restart(self, position: int) -> None:
        epoch = position // self._epoch_size if self._epoch_size else 0
        self._position, self._upcoming = epoch * (self._epoch_size or 0), self._endless(epoch)

    def _next(self) -> PromptRecord:
        try:
            record = next(self._upcoming)
        except UserError:
            self._restart(0)  # the generator ended with the error: asked again, the stream must fail again
            raise
        self._position += 1
        return record

    def _endless(self, first_epoch: int) -> Iterator[PromptRecord]:
        for epoch in itertools.count(first_epoch):
            size = 0
            for record in shuffled(self.finite(), buffer=self._buffer, seed=self._seed, epoch=epoch):
                size += 1
                yield record
            self._epoch_size = size

    def _accepted_rows(self, counts: PromptCounts, rows_per_file: int | None = None) -> Iterator[PromptRecord]:
        """Each record knows the rows that were dropped before it, so that any range of positions has its own count."""
        held: PromptRecord | None = None
        seen = 0
        for file in self._files:
            rows = iter_rows(file.path, text_columns=(self._prompt_field,))
            for number, row in itertools.islice(rows, rows_per_file):
                record = self._record(file, number, row, counts)
                if record is None:
                    continue
                if not self._drops:
                    yield record
                    continue
                if held is not None:
                    yield held
                held, seen = replace(record, skipped=counts.dropped - seen), counts.dropped
        if held is not None:
            yield replace(held, skipped=held.skipped + counts.dropped - seen)

    def _record(self, file: SourceFile, number: int, row: Row, counts: PromptCounts) -> PromptRecord | None:
        where = place(file.path, number)
        text, columns, templated = self._reader.text(row, where)
        if self._fraction and (held_out(text, self._fraction) != (self._split == "eval")):
            return None
        tokens = self._reader.tokens(text, templated=templated, where=where)
        text, tokens, fate = self._reader.fit(text, tokens, where)
        if fate == "dropped":
            counts.dropped += 1
            return None
        counts.accepted += 1
        counts.truncated += fate == "truncated"
        columns = self._complete(columns, where)
        return PromptRecord(file.prompt_id(number), text, tokens, columns, file.path, number, truncated=fate == "truncated")

    def _complete(self, columns: dict[str, Any], where: str) -> dict[str, Any]:
        """The same columns for every row, None where a row lacks one: what a reward is given must not depend on how rows were cut."""
        unknown = [name for name in columns if name not in self._known_columns]
        if unknown:
            raise UserError(
                f"column {unknown[0]!r} comes first here, after the rows that tell the columns of the data",
                where=where,
                fix=f"give one of the first {CHECK_ROWS} rows of a file that column too (null will do)",
            )
        return dict.fromkeys(self._known_columns) | columns

    @functools.cached_property
    def _known_columns(self) -> tuple[str, ...]:
        """The columns of the first rows of all files, but for the prompt itself."""
        rows = (
            row for file in self._files for _, row in itertools.islice(iter_rows(file.path, text_columns=(self._prompt_field,)), CHECK_ROWS)
        )
        return tuple(dict.fromkeys(name for row in rows for name in row if name != self._prompt_field))

    def _nothing(self, counts: PromptCounts, extent: str) -> UserError:
        files = ", ".join(file.path for file in self._files)
        if counts.dropped:
            what = f"all {counts.dropped} {self._split} prompts{extent} are longer than data.max_prompt_tokens and were dropped"
            return UserError(what, where=files, fix="raise data.max_prompt_tokens, or set data.overlong: truncate_left")
        what = f"no row{extent} falls into the {self._split} split (data.eval_fraction is {self._fraction:g})"
        return UserError(what, where=files, fix="change data.eval_fraction, or name held-out files in data.eval")


def held_out(text: str, fraction: float) -> bool:
    """Whether a prompt belongs to the held-out share: by its text alone, so that equal prompts never cross the split."""
    return stable_hash(text) < fraction * 2**64


def check_prompts(section: DataSection, tokenizer: PreTrainedTokenizerBase) -> dict[Split, PromptCounts]:
    """Reads the first rows of every file of every split that the config asks for: seconds, whatever the size of the files.

    Returns:
        Counts of the rows looked at, by split; `eval` only where the config asks for held-out prompts.

    Raises:
        UserError: a bad row among them, or a split without prompts.
    """
    splits: tuple[Split, ...] = ("train", "eval") if section.eval or section.eval_fraction else ("train",)
    return {split: PromptStream(section, tokenizer, split=split, seed=0).check() for split in splits}
