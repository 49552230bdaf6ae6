"""Advantage estimators against slow loops in plain Python, closed forms and golden values."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.algos.advantages import broadcast_to_tokens, gae, grpo, next_baseline, reinforce, rloo


def slow_gae(rewards, values, mask, gamma, lam, bootstrap):
    """One row; drops what the policy did not choose, then the textbook recursion over what is left."""
    kept = [t for t, valid in enumerate(mask) if valid]
    out = [0.0] * len(mask)
    advantage, next_value = 0.0, bootstrap
    for t in reversed(kept):
        delta = rewards[t] + gamma * next_value - values[t]
        advantage = delta + gamma * lam * advantage
        out[t], next_value = advantage, values[t]
    return out


def batch(seed, rows=3, width=7):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(rows, width, dtype=torch.float64, generator=generator) for _ in range(2))
    return rewards, values, torch.rand(rows, width, generator=generator) > 0.4, torch.randn(rows, dtype=torch.float64, generator=generator)


@given(st.integers(0, 2**31), st.floats(0.01, 1), st.floats(0, 1), st.booleans())
def test_gae_equals_the_slow_recursion(seed, gamma, lam, bootstrapped):
    rewards, values, mask, bootstrap = batch(seed)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap_B=bootstrap if bootstrapped else None)
    rows = zip(rewards.tolist(), values.tolist(), mask.tolist(), bootstrap.tolist(), strict=True)
    expected = torch.tensor([slow_gae(r, v, m, gamma, lam, b if bootstrapped else 0.0) for r, v, m, b in rows], dtype=torch.float64)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, torch.where(mask, expected + values, 0.0))


def test_regression_gae_jumps_a_gap_without_decay():
    """NUMERICS section 7: 0.95 before a 10-token gap, not 0.95 ** 11 = 0.569."""
    mask = torch.tensor([[True] + 10 * [False] + [True]])
    rewards = torch.zeros(1, 12)
    rewards[0, -1] = 1.0
    advantages, returns = gae(rewards, torch.zeros(1, 12), mask, gamma=1.0, lam=0.95)
    assert advantages[0, 0].item() == pytest.approx(0.95)
    assert advantages[0].tolist() == [advantages[0, 0].item()] + 10 * [0.0] + [1.0]
    assert torch.equal(returns, advantages)


@given(st.integers(0, 2**31), st.integers(0, 7))
def test_gae_does_not_depend_on_padding(seed, pads):
    """Bit for bit: pads on the right, and a gap in the middle, change nothing."""
    rewards, values, _, bootstrap = batch(seed)
    full = torch.ones_like(rewards, dtype=torch.bool)
    want, _ = gae(rewards, values, full, gamma=0.99, lam=0.9, bootstrap_B=bootstrap)

    def widened(x, fill):
        gap = torch.full((3, pads), fill, dtype=x.dtype)
        return torch.cat([x[:, :4], gap, x[:, 4:], gap], 1)

    got, _ = gae(widened(rewards, 9.0), widened(values, 9.0), widened(full, False), gamma=0.99, lam=0.9, bootstrap_B=bootstrap)
    assert torch.equal(got[widened(full, False)].view(3, 7), want)


def test_lambda_1_is_monte_carlo_and_lambda_0_is_td():
    rewards, values, _, _ = batch(3)
    mask = torch.ones_like(rewards, dtype=torch.bool)
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1))
    one_step, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros(3, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(one_step, rewards + 0.9 * next_values - values)


def test_bootstrap_enters_after_the_last_valid_token():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    advantages, _ = gae(torch.zeros(2, 3), torch.zeros(2, 3), mask, gamma=0.5, lam=1.0, bootstrap_B=torch.tensor([4.0, 8.0]))
    assert advantages.tolist() == [[1.0, 2.0, 0.0], [1.0, 2.0, 4.0]]


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_gae_of_nothing(shape):
    nothing = torch.zeros(shape)
    assert gae(nothing, nothing, nothing.bool(), gamma=1.0, lam=0.95)[0].shape == shape


def test_reinforce():
    assert reinforce(torch.tensor([1.0, -1.0]), 0.25).tolist() == [0.75, -1.25]


GROUPS = torch.tensor([7, 3, 7, 3, 7])
RETURNS = torch.tensor([1.0, 10.0, 2.0, 20.0, 6.0])


def test_rloo_by_hand():
    assert rloo(RETURNS, GROUPS).tolist() == [1 - 4.0, 10 - 20.0, 2 - 3.5, 20 - 10.0, 6 - 1.5]


def test_grpo_by_hand():
    """Unbiased standard deviation: of 1, 2, 6 it is 2.6458; of 10, 20 it is 7.0711."""
    want = [
        (r - statistics.mean(g)) / (statistics.variance(g) + 1e-8) ** 0.5
        for r, g in zip(RETURNS.tolist(), [[1, 2, 6], [10, 20]] * 2 + [[1, 2, 6]], strict=True)
    ]
    torch.testing.assert_close(grpo(RETURNS, GROUPS), torch.tensor(want))


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(2, 5))
def test_group_advantages_against_slow_loops(seed, groups, size):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(groups).repeat(size)[torch.randperm(groups * size, generator=generator)] * 1_000_003 - 5
    returns = torch.randn(groups * size, dtype=torch.float64, generator=generator)
    loo, normed = rloo(returns, ids), grpo(returns, ids)
    for i in range(len(ids)):
        mine = [r for r, g in zip(returns.tolist(), ids.tolist(), strict=True) if g == ids[i]]
        others = list(mine)
        others.remove(returns[i].item())
        assert loo[i].item() == pytest.approx(returns[i].item() - statistics.mean(others))
        assert normed[i].item() == pytest.approx((returns[i].item() - statistics.mean(mine)) / (statistics.variance(mine) + 1e-8) ** 0.5)


@pytest.mark.parametrize("estimator", [rloo, grpo])
def test_a_group_that_agrees_teaches_nothing_and_a_group_of_one_is_an_error(estimator):
    assert estimator(torch.full((3,), 0.1), torch.zeros(3, dtype=torch.long)).tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"single sample \(first: group 9"):
        estimator(torch.randn(3), torch.tensor([1, 1, 9]))


def test_broadcast_to_tokens():
    mask = torch.tensor([[True, False], [True, True]])
    assert broadcast_to_tokens(torch.tensor([2.0, 3.0]), mask).tolist() == [[2.0, 0.0], [3.0, 3.0]]


def test_baseline_starts_at_the_first_mean_and_follows_it():
    assert next_baseline(None, 4.0, 0.9) == 4.0
    assert next_baseline(4.0, 2.0, 0.9) == pytest.approx(3.8)
    assert next_baseline(0.0, 2.0, 0.9) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="mean return of nan"):
        next_baseline(1.0, float("nan"), 0.9)
