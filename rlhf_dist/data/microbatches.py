"""Rows into microbatches of bounded size."""

from __future__ import annotations

from collections.abc import Sequence


def token_budget_cuts(lengths: Sequence[int], budget: int, *, packed: bool = False) -> list[list[int]]:
    """Cuts rows into microbatches so that each, padded to its longest row or packed, holds at most `budget` tokens.

    Rows go longest first (equal lengths in row order), so rows of like length meet and little padding is needed.
    Every row stands in exactly one microbatch; a row longer than the budget travels alone; no microbatch is empty.

    Args:
        lengths: tokens of each row.
        budget: padded tokens (rows × longest row) of one microbatch.
        packed: count tokens alone, because rows share rows of the forward; the few slots left over there come on top.

    Returns:
        Row numbers of each microbatch; no rows, no microbatches.

    Raises:
        ValueError: a budget below 1, or a negative length.
    """
    if budget < 1:
        raise ValueError(f"a microbatch needs a budget of at least one token, got {budget}")
    if any(length < 0 for length in lengths):
        raise ValueError("a row has a negative length")
    cuts: list[list[int]] = []
    held = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        grown = held + (lengths[row] if packed or not cuts else lengths[cuts[-1][0]])
        if cuts and grown <= budget:
            cuts[-1].append(row)
            held = grown
        else:
            cuts.append([row])
            held = lengths[row]
    return cuts
