"""Who trains on what, as a pure function of lengths and seed.

Invariants, each a property test: in every epoch each row stands in exactly one minibatch; minibatch sizes differ by at most one;
which rows form a minibatch does not depend on ranks, budget or lengths; each row of a minibatch goes to exactly one rank and one
microbatch; every rank gets the same number of microbatches (empty ones count for nothing), or ZeRO-3 collectives would not meet.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_dist.data.microbatches import token_budget_cuts

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


def assign(rows: Sequence[int], lengths: Sequence[int], ranks: int, budget: int) -> list[Microbatches]:
    """Spreads a minibatch over ranks: longest rows first, each to the rank with the least tokens; then cuts by token budget.

    Args:
        rows: the minibatch's rows.
        lengths: tokens of every row of the step (indexed by row).
        ranks: data-parallel size.
        budget: padded tokens in one microbatch.

    Returns:
        For each rank its microbatches, all ranks the same number of them.
    """
    load = [0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        lightest = min(range(ranks), key=lambda rank: (load[rank], rank))
        shares[lightest].append(row)
        load[lightest] += lengths[row]
    cuts = [[tuple(share[i] for i in cut) for cut in token_budget_cuts([lengths[row] for row in share], budget)] for share in shares]
    rounds = max(len(cut) for cut in cuts)
    return [tuple(cut) + ((),) * (rounds - len(cut)) for cut in cuts]
