from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_dist.evaluation.calibration import calibrate
from rlhf_dist.evaluation.judged import JudgedPair, PairColumns


def pairs_of(differences: np.ndarray, scale: float = 1.0, seed: int = 0) -> PairColumns:
    """Labels drawn from σ(difference), scores `scale` times as far apart."""
    first_wins = np.random.default_rng(seed).random(len(differences)) < 1 / (1 + np.exp(-differences))
    better = np.where(first_wins, differences, -differences) * scale
    return PairColumns.of([JudgedPair(float(score), 0.0, 1, 1, "s", None, prompt) for prompt, score in enumerate(better)])


def test_scores_that_are_calibrated_lie_on_the_diagonal() -> None:
    differences = np.random.default_rng(1).normal(size=8000) * 1.5
    result = calibrate(pairs_of(differences))
    assert result.ece < 0.02
    assert result.ece == pytest.approx(result.ece_by_chance, abs=0.01) and result.ece_by_chance < 0.01
    inside = [
        b.observed.low <= b.predicted <= b.observed.high for b in result.bins if b.observed.low is not None and b.observed.high is not None
    ]
    assert len(inside) == 10 and sum(inside) >= 8
    assert result.bins[0].predicted < 0.1 and result.bins[-1].predicted > 0.9
    assert {b.observed.n for b in result.bins} == {1600}


def test_scores_that_are_too_sure_are_found_out() -> None:
    differences = np.random.default_rng(1).normal(size=4000) * 1.5
    sure, shy = calibrate(pairs_of(differences, 5.0)), calibrate(pairs_of(differences, 0.2))
    assert sure.ece > 0.12 and shy.ece > 0.12
    assert sure.bins[0].observed.mean > sure.bins[0].predicted + 0.05  # flatter than the diagonal
    assert shy.bins[0].observed.mean < shy.bins[0].predicted - 0.05  # steeper


def test_one_difference_by_hand() -> None:
    # Every pair predicts σ(ln 3) = 0.75, and nine in ten come true.
    better = [math.log(3) if n % 10 else -math.log(3) for n in range(1000)]
    result = calibrate(PairColumns.of([JudgedPair(score, 0.0, 1, 1, "s", None, n) for n, score in enumerate(better)]), bins=2)
    assert [(b.predicted, b.observed.mean) for b in result.bins] == [pytest.approx((0.25, 0.1)), pytest.approx((0.75, 0.9))]
    assert result.ece == pytest.approx(0.15)
    assert result.ece_by_chance == pytest.approx(math.sqrt(2 / math.pi * 0.1875 / 1000))


def test_the_lower_half_mirrors_the_upper() -> None:
    bins = calibrate(pairs_of(np.random.default_rng(2).normal(size=300))).bins
    for low, high in zip(bins[:5], reversed(bins[5:]), strict=True):
        assert low.predicted == 1 - high.predicted and low.observed.mean == 1 - high.observed.mean
        assert high.observed.low is not None and low.observed.high == 1 - high.observed.low
    assert [b.predicted for b in bins] == sorted(b.predicted for b in bins)


def test_soft_labels_count_by_their_probability_and_equal_scores_half() -> None:
    soft = [JudgedPair(math.log(3), 0.0, 1, 1, "s", None, n, 0.75) for n in range(100)]
    assert calibrate(PairColumns.of(soft)).ece < 1e-9
    told_otherwise = [JudgedPair(0.0, math.log(3), 1, 1, "s", None, n, 0.25) for n in range(100)]
    assert calibrate(PairColumns.of(told_otherwise)).ece < 1e-9
    blind = [JudgedPair(1.0, 1.0, 1, 1, "s", None, n) for n in range(10)]
    assert calibrate(PairColumns.of(blind)).ece == 0


def test_the_order_of_pairs_does_not_matter_and_few_pairs_make_few_bins() -> None:
    pairs = pairs_of(np.random.default_rng(2).normal(size=60))
    backwards = PairColumns.of([JudgedPair(float(pairs.better_N[n]), 0.0, 1, 1, "s", None, 60 - n) for n in reversed(range(60))])
    assert calibrate(pairs).ece == pytest.approx(calibrate(backwards).ece)
    three = calibrate(pairs.select(np.arange(60) < 3))
    assert [b.observed.n for b in three.bins] == [1] * 6
