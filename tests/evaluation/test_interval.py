from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.evaluation.interval import clustered_mean

samples = st.lists(st.tuples(st.floats(-1e3, 1e3), st.integers(0, 5)), min_size=1, max_size=40)


def test_two_prompts_by_hand() -> None:
    result = clustered_mean([0.0, 2.0, 3.0], ["a", "a", "b"])
    # Prompt means 1 and 3: s = √2, s/√2 = 1, t(0.975, 1) = 12.7062.
    assert result.mean == 2.0
    assert result.low == pytest.approx(2 - 12.706204736432095)
    assert result.high == pytest.approx(2 + 12.706204736432095)
    assert (result.n, result.clusters) == (3, 2)


def test_one_prompt_has_no_interval() -> None:
    result = clustered_mean([1.0, 2.0], [7, 7])
    assert (result.mean, result.low, result.high, result.n, result.clusters) == (1.5, None, None, 2, 1)


def test_equal_values_have_an_interval_of_width_zero() -> None:
    result = clustered_mean([0.5] * 4, [1, 2, 3, 3])
    assert (result.low, result.high) == (0.5, 0.5)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30))
def test_one_sample_a_prompt_is_the_textbook_interval(values: list[float]) -> None:
    result = clustered_mean(values, range(len(values)))
    error = statistics.stdev(values) / math.sqrt(len(values))
    assert result.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    if error > 1e-9:
        assert (result.low, result.high) == pytest.approx(scipy.stats.t.interval(0.95, len(values) - 1, statistics.fmean(values), error))


@given(samples)
def test_the_order_of_samples_does_not_matter(pairs: list[tuple[float, int]]) -> None:
    forward = clustered_mean(*zip(*pairs, strict=True))
    backward = clustered_mean(*zip(*reversed(pairs), strict=True))
    assert forward == backward


@given(samples, st.integers(2, 4))
def test_repeating_samples_inside_prompts_adds_no_certainty(pairs: list[tuple[float, int]], times: int) -> None:
    once, often = clustered_mean(*zip(*pairs, strict=True)), clustered_mean(*zip(*pairs * times, strict=True))
    assert often.mean == pytest.approx(once.mean, abs=1e-9)
    assert often.n == times * once.n and often.clusters == once.clusters
    if once.low is not None:
        assert often.low == pytest.approx(once.low, abs=1e-6)


@given(samples, st.floats(-100, 100), st.floats(0.1, 10))
def test_the_interval_moves_and_scales_with_the_values(pairs: list[tuple[float, int]], shift: float, scale: float) -> None:
    values, clusters = zip(*pairs, strict=True)
    plain, moved = clustered_mean(values, clusters), clustered_mean([scale * v + shift for v in values], clusters)
    assert moved.mean == pytest.approx(scale * plain.mean + shift, abs=1e-6)
    if plain.low is not None and plain.high is not None:
        assert plain.low <= plain.mean <= plain.high
        assert (moved.low, moved.high) == pytest.approx((scale * plain.low + shift, scale * plain.high + shift), abs=1e-5)


def test_it_covers_the_truth_95_times_in_100_where_the_naive_interval_does_not() -> None:
    generator = np.random.default_rng(0)
    covered = naive = 0
    trials, prompts, each = 800, 8, 10
    clusters = np.repeat(np.arange(prompts), each).tolist()
    for _ in range(trials):
        values = (np.repeat(generator.normal(size=prompts), each) + 0.5 * generator.normal(size=prompts * each)).tolist()
        result, wrong = clustered_mean(values, clusters), clustered_mean(values, range(len(values)))
        assert result.low is not None and result.high is not None and wrong.low is not None and wrong.high is not None
        covered += result.low <= 0 <= result.high
        naive += wrong.low <= 0 <= wrong.high
    assert 0.93 <= covered / trials <= 0.97
    assert naive / trials < 0.7


@pytest.mark.parametrize(("values", "clusters"), [([], []), ([1.0], []), ([float("nan")], [1]), ([1.0, float("inf")], [1, 2])])
def test_bad_input(values: list[float], clusters: list[int]) -> None:
    with pytest.raises(ValueError):
        clustered_mean(values, clusters)
