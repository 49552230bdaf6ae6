"""Token-budget cuts: every row once, no microbatch over budget, the order of rows irrelevant to the shapes."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.contracts.flops import FlopModel
from rlhf_dist.data.microbatches import START_TOKENS, Cost, token_budget_cuts

DEAR = FlopModel(2.0, 0.05).in_tokens
LENGTHS = st.lists(st.integers(0, 60), max_size=40)


@given(LENGTHS, st.integers(1, 200))
def test_every_row_once_and_within_budget(lengths: list[int], budget: int) -> None:
    cuts = token_budget_cuts(lengths, budget)
    assert sorted(row for cut in cuts for row in cut) == list(range(len(lengths)))
    for cut in cuts:
        assert cut
        assert len(cut) == 1 or len(cut) * max(lengths[row] for row in cut) <= budget


@given(LENGTHS, st.integers(1, 200))
def test_rows_come_longest_first(lengths: list[int], budget: int) -> None:
    order = [lengths[row] for cut in token_budget_cuts(lengths, budget) for row in cut]
    assert order == sorted(lengths, reverse=True)


def cost(sizes: list[int], falling: list[int], budget: int, row: Cost = float) -> float:
    """Padded rows and starts of a cut of rows that stand longest first; infinite where one exceeds the budget."""
    total, begin = 0, 0
    for size in sizes:
        tokens = size * falling[begin]
        if size > 1 and tokens > budget:
            return float("inf")
        total, begin = total + size * row(falling[begin]) + START_TOKENS, begin + size
    return total


@given(st.lists(st.integers(0, 600), min_size=1, max_size=8), st.integers(1, 2000), st.sampled_from([float, DEAR]))
def test_no_other_cut_costs_less(lengths: list[int], budget: int, row: Cost) -> None:
    falling = sorted(lengths, reverse=True)
    every = [[]] if not falling else []
    for joints in itertools.product([False, True], repeat=len(falling) - 1):
        sizes = [1]
        for joined in joints:
            if joined:
                sizes[-1] += 1
            else:
                sizes.append(1)
        every.append(sizes)
    least = min(cost(sizes, falling, budget, row) for sizes in every)
    found = cost([len(cut) for cut in token_budget_cuts(lengths, budget, cost=row)], falling, budget, row)
    assert found == pytest.approx(least, rel=1e-12)


def test_where_attention_is_dear_padding_is_cut_finer() -> None:
    lengths = [600, 500, 600, 500]
    assert [len(cut) for cut in token_budget_cuts(lengths, 10**6)] == [2, 2]
    assert [len(cut) for cut in token_budget_cuts([600, 540, 600, 540], 10**6)] == [4]
    assert [len(cut) for cut in token_budget_cuts([600, 540, 600, 540], 10**6, cost=DEAR)] == [2, 2]


def test_ragged_rows_are_not_padded_to_the_longest() -> None:
    """One budget would hold them all: 32 rows of 8 to 256 tokens, 8192 padded, 4224 real."""
    lengths = list(range(8, 264, 8))
    cuts = token_budget_cuts(lengths, 8192)
    padded = sum(len(cut) * lengths[cut[0]] for cut in cuts)
    assert 3 <= len(cuts) <= 12 and padded < 1.2 * sum(lengths)


@given(LENGTHS, st.integers(1, 200), st.randoms(use_true_random=False))
def test_the_shapes_do_not_depend_on_row_order(lengths: list[int], budget: int, rng: random.Random) -> None:
    shuffled = list(lengths)
    rng.shuffle(shuffled)

    def shapes(values: list[int]) -> list[list[int]]:
        return [[values[row] for row in cut] for cut in token_budget_cuts(values, budget)]

    assert shapes(lengths) == shapes(shuffled)


@given(LENGTHS, st.integers(1, 200))
def test_packed_rows_count_their_tokens_alone(lengths: list[int], budget: int) -> None:
    cuts = token_budget_cuts(lengths, budget, packed=True)
    order = [lengths[row] for cut in cuts for row in cut]
    assert sorted(row for cut in cuts for row in cut) == list(range(len(lengths))) and order == sorted(lengths, reverse=True)
    for number, cut in enumerate(cuts):
        held = sum(lengths[row] for row in cut)
        assert len(cut) == 1 or held <= budget
        assert number + 1 == len(cuts) or held + lengths[cuts[number + 1][0]] > budget, "no room was left for the next"


def test_an_example_by_hand() -> None:
    assert token_budget_cuts([3, 9, 4, 3, 20], 12) == [[4], [1], [2, 0, 3]]
    assert token_budget_cuts([3, 8, 4, 3, 20], 12, packed=True) == [[4], [1, 2], [0, 3]]


def test_equal_lengths_keep_row_order() -> None:
    assert token_budget_cuts([5, 5, 5], 10) == [[0, 1], [2]]


def test_no_rows_no_microbatches() -> None:
    assert token_budget_cuts([], 8) == []


@pytest.mark.parametrize("lengths, budget", [([1], 0), ([-1], 4)])
def test_impossible_arguments_are_refused(lengths: list[int], budget: int) -> None:
    with pytest.raises(ValueError):
        token_budget_cuts(lengths, budget)
