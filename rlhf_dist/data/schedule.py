"""Who trains on what, as a pure function of lengths and seed.

Invariants, each a property test: in every epoch each row stands in exactly one minibatch; minibatch sizes differ by at most one;
which rows form a minibatch does not depend on ranks, budget or lengths; each row of a minibatch goes to exactly one rank and one
microbatch; every rank gets the same number of microbatches (empty ones count for nothing), or ZeRO-3 collectives would not meet;
the ranks' costs differ by no more than the heaviest row.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from rlhf_dist.data.microbatches import Cost, token_budget_cuts

Microbatches = tuple[tuple[int, ...], ...]


def minibatch_rows(rows: int, epochs: int, minibatches: int, seed: int, step: int) -> list[list[tuple[int, ...]]]:
    """The rows of each minibatch, by epoch: a fresh permutation an epoch, keyed by seed, step and epoch.

    Raises:
        ValueError: fewer rows than minibatches.
    """
    if rows < minibatches:
        raise ValueError(f"{rows} rows cannot fill {minibatches} minibatches")
    plan = []
    for epoch in range(epochs):
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step, epoch])))
        order = generator.permutation(rows)
        plan.append([tuple(int(row) for row in part) for part in np.array_split(order, minibatches)])
    return plan


def assign(
    rows: Sequence[int], lengths: Sequence[int], ranks: int, budget: int, *, packed: bool = False, cost: Cost = float
) -> list[Microbatches]:
    """Spreads a minibatch over ranks so that they have like work, and cuts each rank's rows by token budget.

    Args:
        rows: the minibatch's rows.
        lengths: tokens of every row of the step (indexed by row).
        ranks: data-parallel size.
        budget: padded tokens in one microbatch.
        packed: the budget counts no padding.
        cost: of a sequence of so many tokens, in tokens' worth (`contracts.flops`); by default its tokens.

    Returns:
        For each rank its microbatches, all ranks the same number of them.
    """
    shares = balance(rows, {row: cost(lengths[row]) for row in rows}, ranks)
    cuts = [
        [tuple(share[i] for i in cut) for cut in token_budget_cuts([lengths[row] for row in share], budget, packed=packed, cost=cost)]
        for share in shares
    ]
    rounds = max(len(cut) for cut in cuts)
    return [tuple(cut) + ((),) * (rounds - len(cut)) for cut in cuts]


def balance(rows: Sequence[int], loads: Sequence[float] | Mapping[int, float], ranks: int) -> list[list[int]]:
    """Shares rows out by Karmarkar and Karp's differencing method (1982): the two most uneven partial shares are merged, heavy on light.

    Loads end at most the heaviest row apart, and mostly far closer. Ties are broken by order, so the answer is the same everywhere.

    Args:
        rows: what to share out. loads: work of every row, by row. ranks: number of shares.

    Returns:
        The rows of each rank in ascending order, the heaviest share first; shares are empty where there are fewer rows than ranks.
    """
    heap = [(-loads[row], number, _single(row, loads[row], ranks)) for number, row in enumerate(rows)]
    heapq.heapify(heap)
    for number in range(len(rows), 2 * len(rows) - 1):
        (_, _, one), (_, _, other) = heapq.heappop(heap), heapq.heappop(heap)
        merged = sorted(((a + b, ours + theirs) for (a, ours), (b, theirs) in zip(one, reversed(other), strict=True)), key=lambda s: -s[0])
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], number, merged))
    return [sorted(share) for _, share in heap[0][2]] if heap else [[] for _ in range(ranks)]


def _single(row: int, load: float, ranks: int) -> list[tuple[float, list[int]]]:
    """One row on the heaviest share, the others empty: (load, rows), heaviest first."""
    return [(load, [row])] + [(0.0, list[int]()) for _ in range(ranks - 1)]
