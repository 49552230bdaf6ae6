from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from rlhf_dist.evaluation.interval import MeanInterval, clustered_mean
from rlhf_dist.evaluation.proportion import clustered_share, paired_share_difference, share_difference

shares = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 6)), min_size=1, max_size=40)


def interval(result: MeanInterval) -> tuple[float, float]:
    assert result.low is not None and result.high is not None
    return result.low, result.high


@pytest.mark.parametrize("right", [30, 170, 300])
def test_many_independent_values_give_wilsons_interval(right: int) -> None:
    result = clustered_share([1.0] * right + [0.0] * (400 - right), range(400))
    wilson = binomtest(right, 400).proportion_ci(0.95, method="wilson")
    assert result.mean == right / 400
    assert interval(result) == pytest.approx((wilson.low, wilson.high), abs=1e-3)


def test_all_right_still_has_a_width() -> None:
    low, high = interval(clustered_share([1.0] * 10, range(10)))
    # Wilson with n = 10, t(0.975, 9) = 2.2622: the lower end is n / (n + t²).
    assert (low, high) == (pytest.approx(10 / (10 + 2.2621571628**2)), 1.0)


def test_copies_of_a_pair_in_one_prompt_add_nothing() -> None:
    outcomes = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    once = clustered_share(outcomes, range(6))
    often = clustered_share([value for value in outcomes for _ in range(5)], [prompt for prompt in range(6) for _ in range(5)])
    assert interval(often) == pytest.approx(interval(once))
    assert (often.n, often.clusters) == (30, 6)


def test_one_prompt_has_no_interval_and_bad_values_are_refused() -> None:
    assert clustered_share([1.0, 0.0], [3, 3]) == MeanInterval(0.5, None, None, 2, 1)
    for values in ([1.5], [-0.1], [math.nan], []):
        with pytest.raises(ValueError):
            clustered_share(values, range(len(values)))


@given(shares)
def test_within_0_and_1_around_the_mean_and_mirrored(pairs: list[tuple[float, int]]) -> None:
    values, clusters = zip(*pairs, strict=True)
    result, mirror = clustered_share(values, clusters), clustered_share([1 - value for value in values], clusters)
    assert mirror.mean == pytest.approx(1 - result.mean)
    if result.low is not None and result.high is not None and mirror.low is not None and mirror.high is not None:
        assert 0 <= result.low <= result.mean <= result.high <= 1
        assert (mirror.low, mirror.high) == pytest.approx((1 - result.high, 1 - result.low))


@pytest.mark.parametrize(("share", "per_prompt"), [(0.97, 1), (0.7, 1), (0.7, 3)])
def test_it_covers_the_truth_about_95_times_in_100(share: float, per_prompt: int) -> None:
    draw = np.random.default_rng(0)
    spread = draw.beta(4 * share, 4 * (1 - share), (400, 40)) if per_prompt > 1 else np.full((400, 40), share)
    covered = 0
    for prompts in spread:
        values = (draw.random((40, per_prompt)) < prompts[:, None]).astype(float)
        low, high = interval(clustered_share(values.ravel().tolist(), np.repeat(np.arange(40), per_prompt).tolist()))
        covered += low <= share <= high
    assert 0.92 <= covered / 400 <= 0.995


def test_a_difference_is_newcombes() -> None:
    # Newcombe 1998, table II, example (a), method 10: 56/70 − 48/80 = 0.2000, [0.0524, 0.3339].
    one, other = (
        MeanInterval(right / count, *binomtest(right, count).proportion_ci(0.95, method="wilson"), count, count)
        for right, count in ((56, 70), (48, 80))
    )
    assert share_difference(one, other) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert share_difference(one, MeanInterval(0.5, None, None, 2, 1)) == (pytest.approx(0.3), None, None)


def test_a_paired_difference_lies_within_its_bounds_where_students_does_not() -> None:
    right, rule = [1.0, 0.0], [0.0, 1.0]
    student = clustered_mean([a - b for a, b in zip(right, rule, strict=True)], range(2))
    assert interval(student)[0] < -1 and interval(student)[1] > 1
    low, high = interval(paired_share_difference(right, rule, range(2)))
    assert -1 <= low < 0 < high <= 1


@given(st.lists(st.tuples(*2 * [st.sampled_from([0.0, 0.5, 1.0])], st.integers(0, 6)), min_size=1, max_size=40))
def test_paired_differences_are_bounded_around_the_mean_and_mirrored(samples: list[tuple[float, float, int]]) -> None:
    one, other, clusters = zip(*samples, strict=True)
    result, mirror = paired_share_difference(one, other, clusters), paired_share_difference(other, one, clusters)
    assert result.mean == pytest.approx(clustered_mean([a - b for a, b in zip(one, other, strict=True)], clusters).mean)
    assert (result.n, result.clusters) == (len(samples), len(set(clusters)))
    if result.clusters == 1:
        assert (result.low, result.high) == (None, None)
    else:
        low, high = interval(result)
        assert -1 - 1e-12 <= low <= result.mean <= high <= 1 + 1e-12
        assert interval(mirror) == pytest.approx((-high, -low))


@pytest.mark.parametrize("agree", [0.9, 0.5, 0.1])
def test_with_many_samples_it_is_students_interval(agree: float) -> None:
    draw = np.random.default_rng(3)
    one = (draw.random(1500) < 0.7).astype(float)
    other = np.where(draw.random(1500) < agree, one, 1 - one)
    student = clustered_mean((one - other).tolist(), range(1500))
    assert interval(paired_share_difference(one.tolist(), other.tolist(), range(1500))) == pytest.approx(interval(student), abs=4e-3)


def test_a_paired_difference_covers_the_truth_about_95_times_in_100() -> None:
    draw = np.random.default_rng(1)
    covered = 0
    for _ in range(500):
        one, both = draw.random(40) < 0.85, draw.random(40) < 0.6
        other = np.where(both, one, draw.random(40) < 0.5)
        low, high = interval(paired_share_difference(one.astype(float).tolist(), other.astype(float).tolist(), range(40)))
        covered += low <= 0.4 * (0.85 - 0.5) <= high
    assert 0.92 <= covered / 500 <= 0.99
