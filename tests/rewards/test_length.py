"""Length control: closed forms, the DAPO curve, and monotonicity."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.contracts.experience import StopReason
from rlhf_dist.rewards.length import minimum_length_penalty, missing_stop_score, soft_overlong_penalty


@pytest.mark.parametrize("rule, expected", [("none", 0.7), ("subtract", -0.3), ("replace", 1.0)])
def test_missing_stop_rules(rule, expected) -> None:
    assert missing_stop_score(0.7, StopReason.LENGTH, rule, 1.0) == pytest.approx(expected)


@pytest.mark.parametrize("rule", ["none", "subtract", "replace"])
@pytest.mark.parametrize("reason", [StopReason.STOP_TOKEN, StopReason.STOP_STRING])
def test_a_stopped_completion_pays_nothing(rule, reason) -> None:
    assert missing_stop_score(0.7, reason, rule, 1.0) == 0.7


def test_stop_reasons_may_be_plain_integers() -> None:
    assert missing_stop_score(0.7, 2, "replace", -5.0) == -5.0


@pytest.mark.parametrize("length, expected", [(1, 0.0), (80, 0.0), (81, 0.025), (90, 0.25), (100, 0.5)])
def test_soft_overlong_is_linear_over_the_buffer(length, expected) -> None:
    assert soft_overlong_penalty(length, max_new_tokens=100, buffer=20, penalty=0.5) == pytest.approx(expected)


@given(st.integers(1, 200), st.integers(1, 100))
def test_soft_overlong_equals_the_papers_three_cases(length: int, buffer: int) -> None:
    limit = 100
    if length <= limit - buffer:
        reward = 0.0
    elif length <= limit:
        reward = ((limit - buffer) - length) / buffer
    else:
        reward = -1.0
    assert soft_overlong_penalty(length, limit, buffer, 1.0) == pytest.approx(-reward)


def test_a_buffer_of_zero_switches_soft_overlong_off() -> None:
    assert soft_overlong_penalty(100, 100, 0, 5.0) == 0.0


@pytest.mark.parametrize("length, expected", [(7, 2.0), (8, 0.0), (9, 0.0)])
def test_minimum_length_is_met_at_the_minimum(length, expected) -> None:
    assert minimum_length_penalty(length, 8, 2.0) == expected


def test_minimum_length_zero_switches_it_off() -> None:
    assert minimum_length_penalty(0, 0, 2.0) == 0.0
