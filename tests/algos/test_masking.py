"""Masked operations: values, gradients, and the mistakes they exist to avoid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.algos.masking import last_valid, masked, masked_mean, masked_sum

MASK = torch.tensor([[True, False, True], [False, True, False]])


def test_masked_fills_and_keeps_the_dtype():
    x = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    assert masked(x, MASK, -1.0).tolist() == [[0.0, -1.0, 2.0], [-1.0, 4.0, -1.0]]
    assert masked(x, MASK).dtype == torch.bfloat16


@pytest.mark.parametrize("poison", [1e6, float("nan"), float("inf"), -1e30])
def test_sum_and_mean_do_not_hear_masked_slots(poison):
    x = torch.full((2, 3), poison)
    x[MASK] = torch.tensor([1.0, 2.0, 6.0])
    x.requires_grad_()
    assert masked_sum(x, MASK).item() == 9.0
    mean = masked_mean(x, MASK)
    mean.backward()
    assert mean.item() == 3.0
    assert torch.equal(x.grad, torch.where(MASK, 1 / 3, 0.0))


def test_regression_multiplying_by_the_mask_sends_nan_through():
    """NUMERICS section 7: `NaN * 0`; and a single `where` after exp still has a NaN gradient, the double one has none."""
    x = torch.tensor([1.0, float("nan")], requires_grad=True)
    mask = torch.tensor([True, False])
    assert torch.isnan((x * mask).sum())
    assert torch.isnan(torch.autograd.grad(torch.where(mask, x.exp(), 0.0).sum(), x)[0]).any()
    assert torch.autograd.grad(masked_sum(masked(x, mask).exp(), mask), x)[0].tolist() == [pytest.approx(2.7182817), 0.0]


def test_the_sum_over_nothing_is_a_zero_with_gradient_and_the_mean_is_an_error():
    x = torch.full((2, 3), float("nan"), requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    total = masked_sum(x, nothing)
    total.backward()
    assert total.item() == 0.0 and torch.equal(x.grad, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="no valid slot"):
        masked_mean(x, nothing)


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_last_valid_marks_the_last_true_of_each_row(rows):
    marked = last_valid(torch.tensor(rows)).tolist()
    for row, marks in zip(rows, marked, strict=True):
        expected = max((t for t, valid in enumerate(row) if valid), default=None)
        assert [t for t, mark in enumerate(marks) if mark] == ([] if expected is None else [expected])


def test_last_valid_of_no_positions():
    assert last_valid(torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)
