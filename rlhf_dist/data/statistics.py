"""What a set of files holds: layouts, counts, lengths, balance of labels, repeats, and prompts that two files share or nearly share.

One pass; of each row only hashes and a signature stay in memory (at most 64 bytes), so files may be larger than memory.
Lengths and balance are those of the good rows; faulty rows are counted by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rlhf_dist.data.chat import render
from rlhf_dist.data.files import place
from rlhf_dist.data.layouts import Demonstration, PreferencePair, Ranking, Record
from rlhf_dist.data.records import stable_hash
from rlhf_dist.data.sketches import SIGNATURE_BYTES, Column, Lengths, near_pairs, repeats, signature
from rlhf_dist.data.splitting import prompt_text, split_key
from rlhf_dist.data.validation import ReadCounts, Reading, typed_rows

MAX_SOURCES = 1000
OTHER_SOURCES = "(other sources)"
EXAMPLES = 10


@dataclass
class FileCounts:
    """One file: its layout, and what became of its rows."""

    path: str
    layout: str
    counts: ReadCounts = field(default_factory=ReadCounts)


@dataclass(frozen=True)
class Overlap:
    """Prompts of `second` that `first` has too: equal after normalisation, or nearly so; `examples` are pairs of places."""

    first: str
    second: str
    equal: int
    near: int
    examples: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Statistics:
    """The whole report; `as_dict` for JSON.

    characters, tokens: summaries by part: prompt, completion, chosen, rejected, answer (of a ranking), text (prompt + answer).
    sources: for each source its rows, labels (a, b, tie), places of the best answer, and whether the longer answer was chosen.
    repeated_rows: good rows whose prompt and answers came before. distinct_prompts: after normalisation.
    near_prompts: rows whose prompt nearly repeats an earlier, different one of the same file.
    """

    files: tuple[FileCounts, ...]
    characters: dict[str, dict[str, float | int]]
    tokens: dict[str, dict[str, float | int]]
    sources: dict[str, dict[str, int]]
    repeated_rows: int
    distinct_prompts: int
    near_prompts: int
    overlaps: tuple[Overlap, ...]

    @property
    def faults(self) -> Counter[str]:
        """Faulty rows of all files by reason."""
        return sum((file.counts.dropped for file in self.files), Counter())

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.counts.rows for file in self.files)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        files = [
            {
                "path": file.path,
                "layout": file.layout,
                "rows": file.counts.rows,
                "good": file.counts.accepted,
                "faults": dict(file.counts.dropped),
            }
            for file in self.files
        ]
        return {
            "rows": self.rows,
            "good": sum(file.counts.accepted for file in self.files),
            "faults": dict(self.faults),
            "files": files,
            "characters": self.characters,
            "tokens": self.tokens,
            "sources": self.sources,
            "repeated_rows": self.repeated_rows,
            "distinct_prompts": self.distinct_prompts,
            "near_prompts": self.near_prompts,
            "overlaps": [vars(overlap) for overlap in self.overlaps],
        }


def collect(files: Sequence[str], reading: Reading, tokenizer: PreTrainedTokenizerBase | None = None) -> Statistics:
    """Reads all files once.

    Args:
        files: in the order in which "earlier" is meant; a split goes as train first, then eval.
        reading: how to read them.
        tokenizer: counts tokens too, without special tokens for answers; chats go through its template.

    Raises:
        UserError: a file that cannot be read, or messages and a tokenizer without a chat template.
    """
    collector = _Collector(tokenizer)
    for path in files:
        collector.read(path, reading)
    return collector.statistics()


def answers_of(record: Record) -> dict[str, tuple[str, ...]]:
    """The answers of a record by the name of their part."""
    if isinstance(record, PreferencePair):
        return {"chosen": (record.chosen,), "rejected": (record.rejected,)}
    if isinstance(record, Ranking):
        return {"answer": record.answers}
    return {"completion": (record.completion,)} if isinstance(record, Demonstration) else {}


def labels_of(record: Record) -> Iterator[str]:
    """What the balance counts of a record."""
    if isinstance(record, PreferencePair):
        if record.preferred:
            yield record.preferred
        longer = len(record.chosen) - len(record.rejected)
        yield "chosen longer" if longer > 0 else "chosen shorter" if longer else "equally long"
    elif isinstance(record, Ranking) and record.positions:
        yield f"best at {record.positions[0] + 1}"


class _Collector:
    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._files: list[FileCounts] = []
        self._ends: list[int] = []
        self._characters: dict[str, Lengths] = {}
        self._tokens: dict[str, Lengths] = {}
        self._sources: dict[str, Counter[str]] = {}
        self._row_hashes, self._prompt_hashes = Column(np.uint64), Column(np.uint64)
        self._signatures = Column(np.uint8, SIGNATURE_BYTES)
        self._faulty = Column(np.uint32)  # of each faulty row, how many good ones came before: enough to name any good row

    def read(self, path: str, reading: Reading) -> None:
        file = FileCounts(path, "")
        self._files.append(file)
        for typed in typed_rows(path, reading):
            file.layout = typed.layout
            file.counts.rows += 1
            if typed.fault is not None:
                file.counts.dropped[typed.fault.reason] += 1
                self._faulty.append(len(self._row_hashes))
            if typed.record is not None:
                file.counts.accepted += 1
                self._add(typed.record)
        self._ends.append(len(self._row_hashes))

    def _add(self, record: Record) -> None:
        prompt, answers = prompt_text(record.prompt), answers_of(record)
        key = split_key(record)
        self._row_hashes.append(stable_hash("\0".join([prompt, *(text for texts in answers.values() for text in texts)])))
        self._prompt_hashes.append(stable_hash(key))
        found = signature(key)
        self._signatures.append(np.zeros(SIGNATURE_BYTES, np.uint8) if found is None else found)
        self._count_source(record)
        _measure(self._characters, len(prompt), {part: [len(text) for text in texts] for part, texts in answers.items()})
        if self._tokenizer is not None:
            self._measure_tokens(record, answers, self._tokenizer)

    def _count_source(self, record: Record) -> None:
        known = record.origin.source in self._sources or len(self._sources) < MAX_SOURCES
        counter = self._sources.setdefault(record.origin.source if known else OTHER_SOURCES, Counter())
        counter["rows"] += 1
        counter.update(labels_of(record))

    def _measure_tokens(self, record: Record, answers: dict[str, tuple[str, ...]], tokenizer: PreTrainedTokenizerBase) -> None:
        chat = not isinstance(record.prompt, str)
        text = record.prompt if isinstance(record.prompt, str) else render(record.prompt, tokenizer, where=record.origin.where, ask=True)
        prompt = len(tokenizer(text, add_special_tokens=not chat, verbose=False)["input_ids"])
        tokens = {
            part: [len(tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]) for answer in texts]
            for part, texts in answers.items()
        }
        _measure(self._tokens, prompt, tokens)

    def statistics(self) -> Statistics:
        repeated = repeats(self._row_hashes.take())  # its memory is free again before the signatures are compared
        hashes, signatures = self._prompt_hashes.take(), self._signatures.take()
        distinct = len(hashes) - repeats(hashes.copy())
        within = near_pairs(signatures, hashes, self._ends, across=False)
        return Statistics(
            tuple(self._files),
            {part: lengths.summary() for part, lengths in self._characters.items()},
            {part: lengths.summary() for part, lengths in self._tokens.items()},
            {source: dict(counter) for source, counter in self._sources.items()},
            repeated,
            distinct,
            len(within.later),
            tuple(self._overlaps(hashes, signatures)),
        )

    def _overlaps(self, hashes: NDArray[np.uint64], signatures: NDArray[np.uint8]) -> Iterator[Overlap]:
        if len(self._files) < 2:
            return
        near = near_pairs(signatures, hashes, self._ends, across=True)
        earlier, later = (np.searchsorted(self._ends, rows, "right") for rows in (near.earlier, near.later))
        starts = [0, *self._ends]
        faulty = self._faulty.take()
        for i, j in combinations(range(len(self._files)), 2):
            first = np.unique(hashes[starts[i] : starts[i + 1]])
            equal = int(np.isin(hashes[starts[j] : starts[j + 1]], first).sum())
            chosen = (earlier == i) & (later == j)
            pairs = zip(near.earlier[chosen][:EXAMPLES], near.later[chosen][:EXAMPLES], strict=True)
            examples = tuple((self._place(i, int(a), faulty), self._place(j, int(b), faulty)) for a, b in pairs)
            yield Overlap(self._files[i].path, self._files[j].path, equal, int(chosen.sum()), examples)

    def _place(self, file: int, good: int, faulty: NDArray[np.uint32]) -> str:
        """Where the good row of that number, of all files, stands in its file."""
        start = self._ends[file - 1] if file else 0
        before = int((faulty <= good).sum()) - sum(other.counts.dropped.total() for other in self._files[:file])
        return place(self._files[file].path, good - start + before)


def _measure(into: dict[str, Lengths], prompt: int, answers: dict[str, list[int]]) -> None:
    parts = {"prompt": [prompt], **answers, "text": [prompt + length for lengths in answers.values() for length in lengths] or [prompt]}
    for part, lengths in parts.items():
        if part not in into:
            into[part] = Lengths()
        for length in lengths:
            into[part].add(length)
