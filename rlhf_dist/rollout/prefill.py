"""Which prompts are computed together, and in which pieces: bounds memory, and keeps a row's shapes a matter of that row alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PREFILL_TOKENS = 8192
"""Padded tokens in one forward: bounds the memory of its activations."""
PREFILL_CHUNK = 512
"""Positions of one row in one forward; longer prompts come in pieces. A multiple of `SPAN_STEP`."""
SPAN_STEP = 16
"""Widths and attention spans are rounded up to a multiple of this. A row's result is then the same to the last bit whatever the other
rows' lengths are (masked positions fill whole vector registers with zeros), and GPU kernels get the aligned masks they want."""


@dataclass(frozen=True)
class Piece:
    """One forward: positions `start` to `start + width` of `rows` (indices of the given lengths), the shorter ones padded at their end."""

    rows: tuple[int, ...]
    start: int
    width: int


def pieces(lengths: Sequence[int], exact: bool) -> Iterator[Piece]:
    """Forwards that compute all positions of all rows, every row's pieces in order.

    Args:
        lengths: positions of each row, at least 1.
        exact: only rows of one rounded length share a forward, so that a row's padding does not depend on others. Otherwise all that
            take equally many pieces do: fewer and larger forwards.
    """
    step = SPAN_STEP if exact else PREFILL_CHUNK
    alike: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        alike.setdefault(-(-lengths[row] // step), []).append(row)
    for rows in alike.values():
        together = max(1, PREFILL_TOKENS // min(PREFILL_CHUNK, round_up(lengths[rows[0]], SPAN_STEP)))
        for first in range(0, len(rows), together):
            batch = tuple(rows[first : first + together])
            longest = lengths[batch[0]]
            for start in range(0, longest, PREFILL_CHUNK):
                yield Piece(batch, start, min(PREFILL_CHUNK, round_up(longest - start, SPAN_STEP)))


def round_up(number: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-number // step) * step
