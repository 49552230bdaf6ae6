"""The mixture: closed forms, abstention, whole groups, and what it refuses."""

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.rewards import RewardSection
from rlhf_dist.contracts.experience import StopReason
from rlhf_dist.rewards.mixture import Faults, MixedScores, RewardMixer

STOP, STRING, LENGTH = StopReason.STOP_TOKEN, StopReason.STOP_STRING, StopReason.LENGTH


def section(*sources: dict, **control: dict) -> RewardSection:
    given = sources or ({"name": "a"}, {"name": "b"})
    return RewardSection.model_validate({"sources": [{"kind": "function", "path": "m:f", **source} for source in given], **control})


def mix(mixer: RewardMixer, results: dict, group_size: int = 1, **options) -> MixedScores:
    rows = len(next(iter(results.values())))
    lengths, reasons = options.pop("lengths", [5] * rows), options.pop("reasons", [STOP] * rows)
    return mixer.mix(results, lengths, reasons, group_size, **options)


def test_weighted_sum() -> None:
    mixer = RewardMixer(section({"name": "a", "weight": 2.0}, {"name": "b", "weight": -0.5}), 10)
    mixed = mix(mixer, {"a": [1.0, 2.0], "b": [4.0, 0.0]})
    assert mixed.scores == (0.0, 4.0)
    assert mixed.keep == (True, True)


def test_an_abstaining_reward_leaves_the_others_to_decide() -> None:
    mixed = mix(RewardMixer(section(), 10), {"a": [1.0, None, 3.0], "b": [10.0, 20.0, None]})
    assert mixed.scores == (11.0, 20.0, 3.0)
    means = mixed.tally.means()
    assert means["rewards/a"] == 2.0 and means["rewards/b"] == 15.0
    assert means["rewards/a_abstained"] == pytest.approx(1 / 3)
    assert means["rewards/dropped_samples"] == 0


def test_a_sample_nobody_judges_is_dropped_with_its_group_and_never_scored() -> None:
    mixed = mix(RewardMixer(section(), 10), {"a": [1.0, None, 3.0, 4.0], "b": [1.0, None, None, 5.0]}, group_size=2)
    assert mixed.keep == (False, False, True, True)
    assert all(math.isnan(score) for score in mixed.scores[:2])
    assert mixed.scores[2:] == (3.0, 9.0)
    means = mixed.tally.means()
    assert means["rewards/dropped_samples"] == 2
    assert means["objective/scores"] == 6.0, "dropped rows must not count"
    assert means["rewards/a"] == pytest.approx(8 / 3), "the raw mean is over every value given"


@given(
    st.lists(st.tuples(st.one_of(st.none(), st.floats(-5, 5)), st.one_of(st.none(), st.floats(-5, 5))), min_size=1, max_size=8),
    st.integers(1, 3),
)
def test_keep_is_group_wise_and_every_kept_score_is_finite(pairs: list, group_size: int) -> None:
    rows = [pair for pair in pairs for _ in range(group_size)]
    rows[0] = (1.0, rows[0][1])
    results = {"a": [first for first, _ in rows], "b": [second for _, second in rows]}
    expected = []
    for start in range(0, len(rows), group_size):
        group = rows[start : start + group_size]
        expected += [all(pair != (None, None) for pair in group)] * group_size
    mixer = RewardMixer(section(), 10)
    if not any(expected):
        with pytest.raises(UserError, match="every reward abstained"):
            mix(mixer, results, group_size)
        return
    mixed = mix(mixer, results, group_size)
    assert list(mixed.keep) == expected
    assert [math.isfinite(score) for score in mixed.scores] == expected


def test_no_step_on_zero_samples() -> None:
    with pytest.raises(UserError, match="all 2 samples were dropped"):
        mix(RewardMixer(section(), 10), {"a": [None, 1.0], "b": [None, 2.0]}, group_size=2)


def test_training_normalises_by_moments_that_include_the_batch() -> None:
    mixer = RewardMixer(section({"name": "a", "normalise": "standardise", "weight": 3.0}), 10)
    first, second = [1.0, 2.0, 6.0], [0.0, None, 4.0]
    mix(mixer, {"a": first})
    seen = [1.0, 2.0, 6.0, 0.0, 4.0]
    mixed = mixer.mix({"a": second}, [5] * 3, [STOP] * 3, 1)
    expected = [3.0 * (x - statistics.fmean(seen)) / statistics.stdev(seen) for x in (0.0, 4.0)]
    assert [mixed.scores[0], mixed.scores[2]] == pytest.approx(expected)
    assert mixed.tally.means()["rewards/a"] == 2.0, "the raw reward is logged, not the normalised one"


def test_evaluation_uses_the_moments_and_leaves_them_alone() -> None:
    mixer = RewardMixer(section({"name": "a", "normalise": "scale"}), 10)
    mix(mixer, {"a": [0.0, 2.0]})
    before = mixer.state_dict()
    mixed = mix(mixer, {"a": [50.0, -7.0]}, update=False)
    assert mixer.state_dict() == before
    assert mixed.scores == pytest.approx((50.0 / 2**0.5, -7.0 / 2**0.5))


def test_length_control_acts_on_the_mixed_score() -> None:
    control = {
        "missing_stop": {"rule": "replace", "value": -1.0},
        "soft_overlong": {"buffer": 4, "penalty": 2.0},
        "minimum_length": {"tokens": 3, "penalty": 0.5},
    }
    mixer = RewardMixer(section({"name": "a", "weight": 2.0}, **control), 10)
    mixed = mix(mixer, {"a": [3.0] * 5}, lengths=[2, 3, 8, 10, 10], reasons=[STOP, STRING, STOP, STOP, LENGTH])
    assert mixed.scores == pytest.approx((5.5, 6.0, 5.0, 4.0, -3.0))
    means = mixed.tally.means()
    assert means["rewards/a"] == 3.0
    assert means["rewards/length_control"] == pytest.approx((-0.5 + 0 - 1 - 2 - 9) / 5)
    assert means["objective/scores"] == pytest.approx(17.5 / 5)


def test_stop_reasons_are_counted() -> None:
    means = mix(RewardMixer(section({"name": "a"}), 10), {"a": [1.0] * 4}, reasons=[STOP, STOP, STRING, LENGTH]).tally.means()
    assert means["val/stop_token_rate"] == 0.5
    assert means["val/stop_string_rate"] == 0.25
    assert means["val/length_limit_rate"] == 0.25


def test_a_reward_that_only_abstains_has_no_mean() -> None:
    means = mix(RewardMixer(section(), 10), {"a": [None, None], "b": [1.0, 2.0]}).tally.means()
    assert "rewards/a" not in means and means["rewards/a_abstained"] == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_stops_the_run_and_leaves_the_moments_clean(bad: float) -> None:
    mixer = RewardMixer(section({"name": "a", "normalise": "scale"}), 10)
    with pytest.raises(UserError, match=r"reward 'a' gave (nan|inf|-inf) for row 1"):
        mix(mixer, {"a": [1.0, bad]})
    assert mixer.state_dict()["a"]["count"] == 0


@pytest.mark.parametrize(
    "results, lengths, reasons, group_size",
    [
        ({"a": [1.0]}, [5], [STOP], 1),
        ({"a": [1.0], "b": [1.0], "c": [1.0]}, [5], [STOP], 1),
        ({"a": [1.0], "b": [1.0, 2.0]}, [5], [STOP], 1),
        ({"a": [1.0], "b": [1.0]}, [5], [STOP, STOP], 1),
        ({"a": [1.0] * 3, "b": [1.0] * 3}, [5] * 3, [STOP] * 3, 2),
        ({"a": [], "b": []}, [], [], 1),
        ({"a": [1.0], "b": [1.0]}, [5], [STOP], 0),
    ],
    ids=["missing", "unknown", "wrong length", "wrong reasons", "half a group", "no rows", "no group size"],
)
def test_what_does_not_fit_together_is_refused(results, lengths, reasons, group_size) -> None:
    with pytest.raises(ValueError):
        RewardMixer(section(), 10).mix(results, lengths, reasons, group_size)


def test_state_survives_json_and_later_mixes_are_equal() -> None:
    sources = section({"name": "a", "normalise": "standardise", "clip": 2.0}, {"name": "b", "normalise": "scale"})
    first, second = RewardMixer(sources, 10), RewardMixer(sources, 10)
    mix(first, {"a": [0.1, 0.7, -3.0], "b": [1.0, None, 2.5]})
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    batch = {"a": [0.3, None], "b": [7.0, 1.0]}
    assert mix(second, batch).scores == mix(first, batch).scores


def test_the_state_of_other_rewards_is_refused() -> None:
    with pytest.raises(UserError, match=r"\['x'\].*\['a', 'b'\]"):
        RewardMixer(section(), 10).load_state_dict({"x": {"count": 0, "mean": 0.0, "m2": 0.0}})


DROPS = {"name": "a", "on_failure": "drop_group", "retries": 1}
DEFAULTS = {"name": "b", "on_failure": "default", "default": 0.5, "weight": 2.0, "normalise": "standardise"}


def test_a_failed_row_takes_its_group_along_also_when_other_rewards_scored_it() -> None:
    faults = Faults(failed={"a": {1}}, retried={"a": 3}, timeouts={"a": 2})
    mixed = mix(RewardMixer(section(DROPS, {"name": "c"}), 10), {"a": [1.0, None, 3.0, 4.0], "c": [1.0] * 4}, group_size=2, faults=faults)
    assert mixed.keep == (False, False, True, True) and mixed.scores[2:] == (4.0, 5.0) and mixed.dropped_by_failure == 2
    means = mixed.tally.means()
    assert (means["rewards/a_failed"], means["rewards/a_retried"], means["rewards/a_timeouts"]) == (1, 3, 2)
    assert (means["rewards/dropped_failed"], means["rewards/dropped_samples"]) == (2, 2)
    assert means["rewards/a"] == pytest.approx(8 / 3) and means["rewards/a_abstained"] == 0, "a failure is no abstention"


def test_abstention_and_failure_are_dropped_apart() -> None:
    mixed = mix(RewardMixer(section(DROPS), 10), {"a": [None, 1.0, None, 2.0, 3.0, 4.0]}, group_size=2, faults=Faults(failed={"a": {2}}))
    means = mixed.tally.means()
    assert mixed.keep == (False, False, False, False, True, True)
    assert (means["rewards/dropped_failed"], means["rewards/dropped_samples"], mixed.dropped_by_failure) == (2, 4, 2)
    assert (means["rewards/a_failed"], means["rewards/a_abstained"]) == (1, pytest.approx(1 / 6))


def test_a_default_is_mixed_but_never_learnt_from() -> None:
    """Moments of 1 and 3 alone: mean 2, σ √2; the default 0.5 is normalised by them."""
    mixer = RewardMixer(section(DEFAULTS), 10)
    mixed = mix(mixer, {"b": [1.0, 0.5, 3.0]}, faults=Faults(defaulted={"b": {1}}))
    assert mixer.state_dict()["b"] == {"count": 2, "mean": 2.0, "m2": 2.0}
    assert mixed.scores == pytest.approx(tuple(2 * (x - 2) / 2**0.5 for x in (1.0, 0.5, 3.0))) and all(mixed.keep)
    means = mixed.tally.means()
    assert (means["rewards/b_defaulted"], means["rewards/b_timeouts"], means["rewards/b"], means["rewards/b_abstained"]) == (1, 0, 2.0, 0)


def test_what_a_rule_cannot_lead_to_is_no_metric() -> None:
    plain = mix(RewardMixer(section(), 10), {"a": [1.0], "b": [1.0]}).tally.means()
    assert not any(name.endswith(("_failed", "_defaulted", "_retried", "_timeouts")) for name in plain)
    counting = mix(RewardMixer(section(DROPS, DEFAULTS), 10), {"a": [1.0], "b": [1.0]}).tally.means()
    expected = {
        "rewards/a_failed",
        "rewards/a_timeouts",
        "rewards/a_retried",
        "rewards/b_defaulted",
        "rewards/b_timeouts",
        "rewards/dropped_failed",
    }
    assert counting.keys() - plain.keys() == expected and all(counting[name] == 0 for name in expected)
    assert RewardMixer(section(DROPS, DEFAULTS, {"name": "c"}), 10).fallible == {"a", "b"}


def test_when_all_is_dropped_the_failures_are_named() -> None:
    with pytest.raises(UserError, match=r"all 2 samples were dropped: .*reward .a. failed on 1"):
        mix(RewardMixer(section(DROPS), 10), {"a": [None, 1.0]}, group_size=2, faults=Faults(failed={"a": {0}}))
