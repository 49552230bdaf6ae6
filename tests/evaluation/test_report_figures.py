from __future__ import annotations

import pytest

from rlhf_dist.evaluation.interval import MeanInterval
from rlhf_dist.evaluation.report_figures import (
    MAX_BUCKETS,
    accuracy_figure,
    bucket_figure,
    calibration_figure,
    histogram_figure,
    length_figure,
)
from rlhf_dist.evaluation.reward_report import Bucket, JudgedPair, RewardReport, reward_report


@pytest.fixture(scope="module")
def report() -> RewardReport:
    pairs = [JudgedPair(n % 7 / 3.0, n % 5 / 3.0, n % 11 + 1, n % 13 + 1, "a", n % 4 / 2.0, n) for n in range(120)]
    return reward_report(pairs, pairs[:40])


def test_bars_are_the_accuracies_with_their_intervals(report: RewardReport) -> None:
    (bars,) = accuracy_figure(report).data
    assert list(bars.y) == ["held out", "train", "longer answer wins", "shorter answer wins", "random"]
    assert bars.x[0] == report.held_out.accuracy.mean and bars.x[4] == 0.5
    accuracy = report.held_out.accuracy
    assert accuracy.high is not None and accuracy.low is not None
    assert bars.error_x.array[0] == pytest.approx(accuracy.high - accuracy.mean)
    assert bars.error_x.arrayminus[0] == pytest.approx(accuracy.mean - accuracy.low)
    assert bars.error_x.array[4] == bars.error_x.arrayminus[4] == 0


def test_the_curve_stands_beside_the_diagonal(report: RewardReport) -> None:
    diagonal, curve = calibration_figure(report.calibration).data
    assert (list(diagonal.x), list(diagonal.y)) == ([0, 1], [0, 1])
    assert list(curve.x) == [each.predicted for each in report.calibration.bins]
    assert list(curve.y) == [each.observed.mean for each in report.calibration.bins]


def test_the_histogram_shows_both_sides(report: RewardReport) -> None:
    better, worse = histogram_figure(report.scores).data
    assert sum(better.y) == sum(worse.y) == report.held_out.pairs
    assert better.name == "better answer" and better.marker.color != worse.marker.color


def test_the_scatter_shows_every_point_and_the_mean_by_length(report: RewardReport) -> None:
    points, means = length_figure(report.lengths).data
    assert len(points.x) == len(report.lengths.points)
    assert len(means.x) == 10 and list(means.x) == sorted(means.x)


def test_many_buckets_are_cut_and_names_are_text() -> None:
    accuracy = MeanInterval(0.5, None, None, 1, 1)
    figure = bucket_figure([Bucket("<b>%{x}</b> and much more that is long", accuracy)] + [Bucket("s", accuracy)] * 40, accuracy)
    assert len(figure.data[0].y) == MAX_BUCKETS
    label = figure.layout.yaxis.ticktext[0]
    assert label.startswith("&lt;b&gt;") and "…<br>n = 1" in label
    assert "%{" not in figure.data[0].hovertext[0]
