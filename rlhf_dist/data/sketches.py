"""What stays in memory of a row: hashes and signatures in numpy columns, at most 64 bytes a row; lengths go into fixed histograms."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

SIGNATURE_BYTES = 32
BAND_BYTES = 4
SHINGLE_WORDS = 3
NEAR = 26  # of 32 equal bytes: an estimated Jaccard similarity of 0.8

_MULTIPLIERS = np.random.Generator(np.random.Philox(7)).integers(1, 2**63, size=SIGNATURE_BYTES, dtype=np.uint64) | np.uint64(1)
_OFFSETS = np.random.Generator(np.random.Philox(11)).integers(0, 2**63, size=SIGNATURE_BYTES, dtype=np.uint64)
_LONG = 1 << 16
_WINDOW = 4
_ROW_BITS = np.uint64(32)
_BLOCK = 1 << 14


T = TypeVar("T", bound=np.generic)


class Column(Generic[T]):
    """A growing array of rows of one type; it grows in place by a sixteenth, so little more than its rows is ever held."""

    def __init__(self, dtype: type[T], width: int | None = None) -> None:
        self._values: NDArray[T] = np.empty(16 if width is None else (16, width), dtype)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, value: int | NDArray[T]) -> None:
        """Adds a row."""
        if self._count == len(self._values):
            self._resize(self._count + max(16, self._count // 16))
        self._values[self._count] = value
        self._count += 1

    def take(self) -> NDArray[T]:
        """The rows, [N] or [N, width]; the column is empty afterwards."""
        self._resize(self._count)
        values, self._values, self._count = self._values, self._values[:0].copy(), 0
        return values

    def _resize(self, rows: int) -> None:
        self._values.resize((rows, *self._values.shape[1:]), refcheck=False)


class Lengths:
    """Lengths seen so far, exactly, in memory that grows with the longest and not with the rows (beyond 65,535: 4 bytes each)."""

    def __init__(self) -> None:
        self._counts = np.zeros(1 << 10, np.int64)
        self._long = array("I")

    def add(self, length: int) -> None:
        """Counts one text."""
        if length >= _LONG:
            self._long.append(length)
            return
        if length >= len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros((1 << length.bit_length()) - len(self._counts), np.int64)])
        self._counts[length] += 1

    def summary(self) -> dict[str, float | int]:
        """count, min, median, p90, max (each a length that was seen: the nearest rank) and mean; count alone where nothing was seen."""
        values = np.flatnonzero(self._counts)
        counts = self._counts[values]
        longer = np.sort(np.frombuffer(self._long, np.uint32)) if self._long else np.empty(0, np.uint32)
        values = np.concatenate([values, longer.astype(np.int64)])
        totals = np.cumsum(np.concatenate([counts, np.ones(len(longer), np.int64)]))
        if not len(values):
            return {"count": 0}
        count = int(totals[-1])
        ranks = {"min": 1, "median": (count + 1) // 2, "p90": -(-9 * count // 10), "max": count}
        found = {name: int(values[np.searchsorted(totals, rank)]) for name, rank in ranks.items()}
        mean = float((values * np.diff(totals, prepend=0)).sum() / count)
        return {"count": count, **found, "mean": round(mean, 1)}


def signature(text: str) -> NDArray[np.uint8] | None:
    """MinHash of the word 3-grams of a normalised text, one byte a permutation, uint8 [32]; None for a text without words.

    The share of equal bytes estimates the Jaccard similarity of two texts' 3-grams (Broder 1997; bytes: Li and König 2010), too high
    by at most 1/256.
    """
    words = text.split()
    if not words:
        return None
    codes = np.fromiter((crc32(word.encode()) for word in words), np.uint64, len(words))
    width = min(SHINGLE_WORDS, len(words))
    shingles = np.zeros(len(words) - width + 1, np.uint64)
    for place in range(width):
        shingles = (shingles ^ codes[place : len(codes) - width + 1 + place]) * np.uint64(0x9E3779B97F4A7C15)
        shingles ^= shingles >> np.uint64(29)
    smallest = (shingles[:, None] * _MULTIPLIERS + _OFFSETS).min(0)
    return ((smallest * np.uint64(0xD6E8FEB86659FD93)) >> np.uint64(56)).astype(np.uint8)


def repeats(hashes: NDArray[np.uint64]) -> int:
    """How many rows have a hash that came before; sorts in place."""
    hashes.sort()
    return int((hashes[1:] == hashes[:-1]).sum())


@dataclass(frozen=True)
class NearPairs:
    """Rows whose prompts are nearly the same: earlier [M] and later [M], each later row once and in rising order."""

    earlier: NDArray[np.int64]
    later: NDArray[np.int64]


def near_pairs(signatures: NDArray[np.uint8], hashes: NDArray[np.uint64], file_ends: Sequence[int], *, across: bool) -> NearPairs:
    """Rows with an earlier row, in another file (`across`) or in the same, whose prompt is another one but nearly the same.

    Rows that agree in one of eight bands of four bytes are compared, each with the first and the four before it in its band: a
    similarity of 0.8 or more is found with a probability of 0.98, and where many more rows than that resemble each other the
    number is a lower bound. Texts that are equal are no near pair.

    Args:
        signatures: uint8 [N, 32], zeros where a row has none. hashes: of the normalised prompts, uint64 [N].
        file_ends: one past the last row of each file.
    """
    ends = np.asarray(file_ends)
    partner = np.full(len(hashes), -1, np.int32)
    for band in range(SIGNATURE_BYTES // BAND_BYTES):
        entries = _sorted_band(signatures, band)
        for start in range(0, len(entries), _BLOCK):
            for earlier, later in _candidates(entries, start):
                near = (signatures[earlier] == signatures[later]).sum(1) >= NEAR
                near &= (hashes[earlier] != hashes[later]) & signatures[later].any(1) & (partner[later] < 0)
                near &= (np.searchsorted(ends, earlier, "right") != np.searchsorted(ends, later, "right")) == across
                partner[later[near]] = earlier[near]
    found = np.flatnonzero(partner >= 0)
    return NearPairs(partner[found].astype(np.int64), found)


def _sorted_band(signatures: NDArray[np.uint8], band: int) -> NDArray[np.uint64]:
    """Entries (band's four bytes, row number) in order, each as one integer, uint64 [N]: sorted in place, so nothing more is held."""
    entries = signatures.view(np.uint32)[:, band].astype(np.uint64)
    for start in range(0, len(entries), _BLOCK):
        block = entries[start : start + _BLOCK]
        block <<= _ROW_BITS
        block |= np.arange(start, start + len(block), dtype=np.uint64)
    entries.sort()
    return entries


def _candidates(entries: NDArray[np.uint64], start: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Row numbers (earlier, later) that agree in the band: each of a block of entries with the few before it, and the first."""
    places = np.arange(start, min(start + _BLOCK, len(entries)))
    firsts = _firsts(entries, places)
    found = []
    for distance in range(1, _WINDOW + 1):
        near = places - distance >= firsts
        found.append((_rows(entries[places[near] - distance]), _rows(entries[places[near]])))
    far = places - firsts > _WINDOW
    found.append((_rows(entries[firsts[far]]), _rows(entries[places[far]])))
    return found


def _rows(entries: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (entries & np.uint64(2**32 - 1)).astype(np.int64)


def _firsts(entries: NDArray[np.uint64], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place where each entry's band begins; that of the block's first one may have begun before the block."""
    keys = entries[places] >> _ROW_BITS
    changes = np.concatenate([[True], keys[1:] != keys[:-1]])
    starts = np.where(changes, places, 0)
    starts[0] = np.searchsorted(entries, keys[0] << _ROW_BITS)
    return np.maximum.accumulate(starts)
