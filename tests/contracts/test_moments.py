"""Moments of parts merge to the moments of the whole."""

import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.contracts.moments import Moments, merged_moments

VALUES = st.lists(st.floats(-1e3, 1e3), max_size=40)


def direct(values):
    if not values:
        return Moments()
    mean = statistics.fmean(values)
    return Moments(len(values), mean, sum((x - mean) ** 2 for x in values))


@given(VALUES, st.lists(st.integers(0, 40), max_size=4))
def test_merging_any_cut_equals_the_direct_computation(values, cuts):
    edges = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
    got = merged_moments(direct(values[a:b]) for a, b in pairwise(edges))
    want = direct(values)
    assert got.count == want.count
    assert got.mean == pytest.approx(want.mean, rel=1e-9, abs=1e-9)
    assert got.m2 == pytest.approx(want.m2, rel=1e-9, abs=1e-6)


@given(VALUES, VALUES)
def test_the_order_of_merging_does_not_matter(left, right):
    a, b = direct(left).merge(direct(right)), direct(right).merge(direct(left))
    assert a.count == b.count and a.mean == pytest.approx(b.mean, abs=1e-9) and a.m2 == pytest.approx(b.m2, rel=1e-9, abs=1e-6)


def test_the_variance_is_unbiased():
    assert direct([1.0, 2.0, 4.0]).variance == pytest.approx(statistics.variance([1.0, 2.0, 4.0]))


@pytest.mark.parametrize("values", [[], [3.0]])
def test_fewer_than_two_numbers_have_no_variance(values):
    with pytest.raises(ValueError, match=f"at least two valid tokens; the batch has {len(values)}"):
        _ = direct(values).variance


def test_a_large_mean_does_not_eat_the_deviation():
    far = merged_moments(direct([1e9 + x for x in part]) for part in ([0.0, 1.0], [2.0, 3.0]))
    assert far.variance == pytest.approx(statistics.variance([0.0, 1.0, 2.0, 3.0]), rel=1e-6)
