"""Preferences for reward models and DPO: streamed from files of pairs, transcripts, rankings and labelled responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from rlhf_dist.data.layouts import PREFERENCES, PreferencePair, Ranking
from rlhf_dist.data.reading import READ_ALL, ReadOptions, RecordReader


class PreferenceReader(RecordReader):
    """Pairs and rankings.

    Args:
        files, options: as `RecordReader`.
        rankings: `keep` yields a ranking as one record of K answers, `pairs` as its C(K, 2) pairs.
    """

    wanted = PREFERENCES
    what = "preferences"
    fix = "give files with chosen and rejected, ranked answers or labelled responses"

    def __init__(
        self,
        files: Sequence[str],
        options: ReadOptions = READ_ALL,
        *,
        rankings: Literal["keep", "pairs"] = "keep",
    ) -> None:
        super().__init__(files, options)
        self._as_pairs = rankings == "pairs"

    def __iter__(self) -> Iterator[PreferencePair | Ranking]:
        for record in self.records():
            if isinstance(record, Ranking) and self._as_pairs:
                yield from record.pairs()
            elif isinstance(record, (PreferencePair, Ranking)):
                yield record
