"""Running normalisation: against a plain two-pass computation over everything seen, in any split."""

import json
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.rewards.normalise import RunningNormaliser

BATCHES = st.lists(st.lists(st.floats(-100, 100), max_size=8), min_size=1, max_size=6)


@given(BATCHES)
def test_moments_are_those_of_all_samples_of_the_run(batches: list[list[float]]) -> None:
    everything = [value for batch in batches for value in batch]
    normaliser = RunningNormaliser("standardise")
    for batch in batches:
        normaliser.update(batch)
    assert normaliser.moments.count == len(everything)
    if len(everything) >= 2:
        assert normaliser.moments.mean == pytest.approx(statistics.fmean(everything), abs=1e-9)
        assert normaliser.moments.variance == pytest.approx(statistics.variance(everything), abs=1e-7)


def test_scale_divides_and_standardise_also_centres() -> None:
    values = [1.0, 2.0, 3.0, 6.0]
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    scale, standardise = RunningNormaliser("scale"), RunningNormaliser("standardise")
    for normaliser in (scale, standardise):
        normaliser.update(values[:1])
        normaliser.update(values[1:])
    assert scale(5.0) == pytest.approx(5.0 / spread)
    assert standardise(5.0) == pytest.approx((5.0 - mean) / spread)


def test_none_leaves_the_reward_alone_and_still_clips() -> None:
    plain, clipped = RunningNormaliser("none"), RunningNormaliser("none", clip=2.0)
    for normaliser in (plain, clipped):
        normaliser.update([0.0, 100.0])
    assert plain(50.0) == 50.0
    assert [clipped(value) for value in (-50.0, 1.5, 50.0)] == [-2.0, 1.5, 2.0]


def test_clip_bounds_the_normalised_value_not_the_raw_one() -> None:
    normaliser = RunningNormaliser("scale", clip=3.0)
    normaliser.update([0.0, 200.0])  # σ = 141.4
    assert normaliser(200.0) == pytest.approx(200.0 / 141.4213562)
    assert normaliser(1000.0) == 3.0


@pytest.mark.parametrize("seen", [[], [0.3], [0.1] * 7, [0.0, 0.0], [1e9, 1e9, 1e9]])
def test_rewards_without_spread_are_not_blown_up(seen: list[float]) -> None:
    normaliser = RunningNormaliser("scale")
    normaliser.update(seen)
    assert normaliser(0.25) == 0.25


def test_a_small_but_real_spread_counts() -> None:
    normaliser = RunningNormaliser("scale")
    normaliser.update([1e-9, 3e-9])
    assert normaliser(1e-9) == pytest.approx(1 / 2**0.5)


@given(BATCHES, st.floats(-100, 100))
def test_state_survives_json_bit_for_bit(batches: list[list[float]], value: float) -> None:
    before, after = RunningNormaliser("standardise", 4.0), RunningNormaliser("standardise", 4.0)
    for batch in batches:
        before.update(batch)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after(value) == before(value)
    before.update([1.0, 5.0])
    after.update([1.0, 5.0])
    assert after.state_dict() == before.state_dict()
