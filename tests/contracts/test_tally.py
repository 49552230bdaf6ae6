"""Merged tallies equal one count over everything; nothing counted is nothing reported."""

import math
import pickle
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.contracts.tally import Tally, merged

NUMBERS = st.floats(-1e6, 1e6)
ENTRIES = st.lists(st.tuples(st.sampled_from("abc"), NUMBERS, st.integers(0, 50)), max_size=30)


def counted(entries):
    tally = Tally()
    for name, total, weight in entries:
        tally.add(name, total, weight)
        tally.peak(name + "_max", total)
    return tally


@given(ENTRIES, st.lists(st.integers(0, 30), max_size=4))
def test_merging_any_cut_equals_one_count(entries, cuts):
    edges = [0, *sorted(min(cut, len(entries)) for cut in cuts), len(entries)]
    whole = counted(entries)
    pieces = merged(counted(entries[a:b]) for a, b in pairwise(edges))
    assert pieces.weights == whole.weights and pieces.maxima == whole.maxima
    assert pieces.sums == pytest.approx(whole.sums, rel=1e-9, abs=1e-6)


def test_a_mean_is_over_items_not_over_parts():
    long, short = Tally(), Tally()
    long.add("loss", total=9.0, weight=9)
    short.add("loss", total=5.0, weight=1)
    assert merged([long, short]).means() == {"loss": 1.4}


def test_what_was_counted_over_nothing_has_no_mean():
    tally = Tally()
    tally.add("clipfrac", 0.0, 0)
    tally.peak("ratio_max", 1.5)
    assert tally.means() == {"ratio_max": 1.5}
    assert merged([]).means() == {}


@pytest.mark.parametrize("values", [[math.nan, 1.0], [1.0, math.nan], [1.0, math.nan, 2.0]])
def test_a_maximum_does_not_hide_a_nan(values):
    tally = Tally()
    for value in values:
        tally.peak("ratio_max", value)
    assert math.isnan(tally.means()["ratio_max"])


def test_merging_leaves_the_other_tally_alone_and_defaults_are_not_shared():
    first, second = Tally(), Tally()
    second.add("a", 1, 1)
    first.merge(second)
    first.add("a", 1, 1)
    assert second.sums == {"a": 1.0} and Tally().sums == {}


def test_it_travels_between_processes():
    tally = counted([("a", 1.5, 2)])
    assert pickle.loads(pickle.dumps(tally)) == tally
