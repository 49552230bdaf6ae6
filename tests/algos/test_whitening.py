"""Whitening: closed form, exact merging over shards, the errors."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.algos.whitening import masked_moments, whiten
from rlhf_dist.contracts.moments import Moments, merged_moments

X = torch.tensor([[1.0, 2.0, 99.0], [4.0, 5.0, 8.0]])
MASK = torch.tensor([[True, True, False], [True, False, True]])
VALID = [1.0, 2.0, 4.0, 8.0]


def test_moments_are_those_of_the_valid_slots():
    moments = masked_moments(X, MASK)
    assert moments.count == 4
    assert moments.mean == statistics.mean(VALID)
    assert moments.variance == pytest.approx(statistics.variance(VALID), rel=1e-15)


def test_moments_are_in_double_precision():
    x = (torch.arange(8, dtype=torch.float32) + 2.0**23).view(1, 8)
    moments = masked_moments(x, torch.ones(1, 8, dtype=torch.bool))
    assert (moments.mean, moments.m2) == (2.0**23 + 3.5, 42.0)


def test_whitened_values_by_hand():
    """(x − 3.75) · rsqrt(9.58333 + 1e-8), unbiased variance, 0 in the masked slots."""
    whitened = whiten(X, MASK, masked_moments(X, MASK))
    scale = 1 / math.sqrt(statistics.variance(VALID) + 1e-8)
    expected = [[-2.75 * scale, -1.75 * scale, 0.0], [0.25 * scale, 0.0, 4.25 * scale]]
    torch.testing.assert_close(whitened, torch.tensor(expected), rtol=1e-7, atol=0)
    assert whitened.dtype == torch.float32


def test_whitened_batch_has_mean_0_and_unbiased_variance_1():
    x, mask = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)) * 7 + 3, torch.rand(16, 32) > 0.3
    after = masked_moments(whiten(x, mask, masked_moments(x, mask)), mask)
    assert after.mean == pytest.approx(0, abs=1e-6) and after.variance == pytest.approx(1, rel=1e-5)


def test_keep_mean_adds_it_back_in_valid_slots_only():
    moments = masked_moments(X, MASK)
    centred, kept = whiten(X, MASK, moments), whiten(X, MASK, moments, keep_mean=True)
    torch.testing.assert_close(kept, torch.where(MASK, centred + 3.75, 0.0))


def test_epsilon_keeps_equal_values_finite():
    x, mask = torch.full((1, 3), 0.1), torch.ones(1, 3, dtype=torch.bool)
    assert whiten(x, mask, masked_moments(x, mask)).tolist() == [[0.0, 0.0, 0.0]]
    assert whiten(torch.tensor([[1e-4, 0.0]]), mask[:, :2], Moments(2, 0.0, 0.0))[0, 0].item() == pytest.approx(1.0)


@pytest.mark.parametrize("valid", [0, 1])
def test_fewer_than_two_valid_tokens_is_an_error(valid):
    mask = torch.arange(3).unsqueeze(0) < valid
    with pytest.raises(ValueError, match="at least two valid tokens"):
        whiten(torch.randn(1, 3), mask, masked_moments(torch.randn(1, 3), mask))


@given(st.integers(0, 2**31), st.lists(st.integers(0, 6), min_size=0, max_size=4))
def test_whitening_does_not_depend_on_the_shards(seed, cuts):
    generator = torch.Generator().manual_seed(seed)
    x, mask = torch.randn(6, 5, generator=generator) * 3 + 1, torch.rand(6, 5, generator=generator) > 0.3
    mask[0, :2] = True
    bounds = [0, *sorted(cuts), 6]
    shards = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    moments = merged_moments(masked_moments(x[s], mask[s]) for s in shards)
    pieces = torch.cat([whiten(x[s], mask[s], moments) for s in shards])
    torch.testing.assert_close(pieces, whiten(x, mask, masked_moments(x, mask)), rtol=1e-6, atol=1e-7)
