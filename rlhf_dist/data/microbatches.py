"""Rows into microbatches of bounded size, with little padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Cost = Callable[[int], float]
"""What a sequence of so many tokens costs, as so many tokens in which attention were free."""
START_TOKENS = 128
"""What starting a microbatch costs, as so many tokens: below that, cutting further would cost more time than the padding it saves."""


def token_budget_cuts(lengths: Sequence[int], budget: int, *, packed: bool = False, cost: Cost = float) -> list[list[int]]:
    """Cuts rows into microbatches so that each, padded to its longest row or packed, holds at most `budget` tokens.

    Rows go longest first (equal lengths in row order), so rows of like length meet. Of all such cuts, padded rows get the one that costs
    least, padding included, where each microbatch counts as `START_TOKENS` more. Every row stands in exactly one microbatch; a row longer
    than the budget travels alone; no microbatch is empty.

    Args:
        lengths: tokens of each row.
        budget: padded tokens (rows × longest row) of one microbatch.
        packed: count tokens alone, because rows share rows of the forward; the few slots left over there come on top.
        cost: of a padded row by its width; by default its tokens.

    Returns:
        Row numbers of each microbatch; no rows, no microbatches.

    Raises:
        ValueError: a budget below 1, or a negative length.
    """
    if budget < 1:
        raise ValueError(f"a microbatch needs a budget of at least one token, got {budget}")
    if any(length < 0 for length in lengths):
        raise ValueError("a row has a negative length")
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    falling = [lengths[row] for row in order]
    sizes = _filled(falling, budget) if packed else _least_padding(falling, budget, cost)
    ends = np.cumsum(sizes, dtype=int).tolist()
    return [order[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _filled(falling: Sequence[int], budget: int) -> list[int]:
    """Rows of each microbatch, when each is filled as far as it goes."""
    sizes: list[int] = []
    held = 0
    for length in falling:
        if sizes and held + length <= budget:
            sizes[-1] += 1
            held += length
        else:
            sizes.append(1)
            held = length
    return sizes


def _least_padding(falling: Sequence[int], budget: int, cost: Cost) -> list[int]:
    """Rows of each microbatch, by dynamic programming over where the last one begins."""
    longest = np.array(falling, dtype=np.int64)
    widest = np.array([cost(length) for length in falling])
    least = np.zeros(len(falling) + 1)
    begins = np.zeros(len(falling) + 1, dtype=np.int64)
    for end in range(1, len(falling) + 1):
        shortest = falling[end - 1]
        first = max(0, end - max(1, budget // shortest)) if shortest else 0
        rows = end - np.arange(first, end)
        tokens = rows * longest[first:end]
        totals = np.where((tokens <= budget) | (rows == 1), least[first:end] + rows * widest[first:end] + START_TOKENS, np.inf)
        begins[end] = end - 1 - int(totals[::-1].argmin())  # of equals the last: microbatches are full as early as can be
        least[end] = totals.min()
    sizes: list[int] = []
    end = len(falling)
    while end:
        sizes.append(end - int(begins[end]))
        end = int(begins[end])
    return sizes[::-1]
