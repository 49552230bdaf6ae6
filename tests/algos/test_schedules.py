"""Learning-rate schedules."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.algos.schedules import lr_factor


def test_linear_by_hand():
    assert [lr_factor(s, 4, 0, "linear") for s in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [lr_factor(s, 7, 3, "linear") for s in range(7)] == [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]


def test_constant_by_hand():
    assert [lr_factor(s, 5, 1, "constant") for s in range(5)] == [0.5, 1.0, 1.0, 1.0, 1.0]


@given(st.integers(1, 50), st.integers(0, 60), st.sampled_from(["linear", "constant"]))
def test_every_step_taken_has_a_rate_and_the_peak_comes_once_after_the_warmup(total, warmup, schedule):
    factors = [lr_factor(s, total, warmup, schedule) for s in range(total)]
    assert all(0 < f <= 1 for f in factors)
    assert all(a < b for a, b in itertools.pairwise(factors[: warmup + 1]))
    if warmup < total:
        assert factors[warmup] == 1.0 and max(factors[:warmup], default=0) < 1
        assert all(a >= b for a, b in zip(factors[warmup:], factors[warmup + 1 :], strict=False))


@pytest.mark.parametrize("arguments", [(-1, 10, 0, "linear"), (0, 0, 0, "linear"), (0, 10, -1, "constant"), (0, 10, 0, "cosine")])
def test_impossible_points_are_errors(arguments):
    with pytest.raises(ValueError):
        lr_factor(*arguments)
