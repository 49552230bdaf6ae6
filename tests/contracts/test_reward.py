"""What a reward returns: numbers and abstentions pass, everything else is a failure with a name, a place and a cure."""

import dataclasses
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.reward import Attempt, RewardFailure, RewardRequest, RewardResult, checked_attempt, checked_result


@pytest.mark.parametrize(
    "values",
    [
        [1.0, None, -2.5],
        (1, None, Fraction(-5, 2)),
        [np.float32(1.0), None, np.float64(-2.5)],
        [torch.tensor(1.0), None, torch.tensor(-2.5)],
        np.array([1.0, None, -2.5], dtype=object),
    ],
)
def test_numbers_and_abstentions_pass_as_plain_python(values):
    result = checked_result("r", values, 3, "here")
    assert result == RewardResult("r", (1.0, None, -2.5))
    assert [type(value) for value in result.values] == [float, type(None), float]


@pytest.mark.parametrize("values", [np.array([0.5, -0.25]), torch.tensor([0.5, -0.25])])
def test_arrays_pass(values):
    assert checked_result("r", values, 2, "here").values == (0.5, -0.25)


@pytest.mark.parametrize(
    "values",
    ["12", b"12", 0.5, None, {0: 0.5, 1: 0.25}, {0.5, 0.25}, (x for x in (1.0, 2.0)), np.array(0.5), torch.tensor(0.5)],
    ids=["str", "bytes", "number", "none", "dict", "set", "generator", "array of no dimension", "tensor of no dimension"],
)
def test_what_is_no_ordered_list_is_refused(values):
    with pytest.raises(UserError, match="not a list of numbers") as caught:
        checked_result("length", values, 2, "rewards.py:length")
    assert "'length'" in caught.value.what and caught.value.where == "rewards.py:length" and caught.value.fix


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 3.0]])
def test_the_wrong_length_is_refused(values):
    with pytest.raises(UserError, match=f"returned {len(values)} values for 2 completions"):
        checked_result("r", values, 2, "here")


@pytest.mark.parametrize("bad", ["0.5", True, np.bool_(True), [0.5], 1j, Decimal("0.5"), np.array([0.5]), torch.tensor([0.5])])
def test_what_is_no_number_is_refused_with_its_row(bad):
    with pytest.raises(UserError, match="for row 1"):
        checked_result("r", [0.0, bad], 2, "here")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan"), torch.tensor(float("nan"))])
def test_a_number_that_is_not_finite_is_a_failure_never_a_score(bad):
    with pytest.raises(UserError, match="for row 0: a failure, not a score"):
        checked_result("r", [bad], 1, "here")


def test_a_request_counts_its_rows_and_is_frozen():
    request = RewardRequest(prompts=["a", "b"], completions=["c", "d"], columns={"answer": [1, 2]})
    assert len(request) == 2 and RewardRequest([], []).columns == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.prompts = []  # type: ignore[misc]


def test_rows_that_are_no_score_fail_alone_and_a_wrong_shape_fails_the_call():
    attempt = checked_attempt("r", [1.0, math.nan, None, "x"], 4, "here")
    assert attempt.values == (1.0, None, None, None) and sorted(attempt.failures) == [1, 3]
    assert {(f.kind, f.of_call, f.rows) for f in attempt.failures.values()} == {("value", False, 4)}
    whole = checked_attempt("r", [1.0], 4, "here")
    assert whole.values == (None,) * 4 and sorted(whole.failures) == [0, 1, 2, 3]
    assert {(f.kind, f.of_call) for f in whole.failures.values()} == {("shape", True)}


def test_a_number_beyond_all_floats_and_a_long_text_are_failures_of_bounded_length():
    attempt = checked_attempt("r", [10**400, "x" * 10**6], 2, "here")
    assert sorted(attempt.failures) == [0, 1] and all(len(failure.what) < 400 for failure in attempt.failures.values())


def test_a_failed_call_counts_its_timeout():
    assert Attempt.failed(2, RewardFailure("timeout", "late")).timeouts == 1
    assert Attempt.failed(2, RewardFailure("death", "gone")).timeouts == 0
    error = RewardFailure("http", "what", "where", "fix").error()
    assert (error.what, error.where, error.fix) == ("what", "where", "fix")


def test_a_part_of_a_request_keeps_its_columns():
    part = RewardRequest(("a", "b", "c"), ("d", "e", "f"), {"answer": (1, 2, 3)}).select([2, 0])
    assert part == RewardRequest(["c", "a"], ["f", "d"], {"answer": [3, 1]})
