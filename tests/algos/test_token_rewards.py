"""Where the score stands, and what the KL penalty costs."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.algos.token_rewards import sequence_returns, token_rewards


def test_by_hand_with_a_gap_and_pads():
    mask = torch.tensor([[True, False, True, False], [True, True, True, True], [False, False, False, False]])
    kl = torch.tensor([[1.0, 50.0, 2.0, 50.0], [0.0, 1.0, -1.0, 4.0], [9.0, 9.0, 9.0, 9.0]])
    rewards = token_rewards(torch.tensor([3.0, -1.0, 7.0]), kl, mask, coef=0.5)
    assert rewards.tolist() == [[-0.5, 0.0, 2.0, 0.0], [0.0, -0.5, 0.5, -3.0], [0.0, 0.0, 0.0, 0.0]]


def test_regression_the_score_stands_on_the_stop_token_and_not_on_the_first_pad():
    """NUMERICS section 7: a trainer that adds the score on the first pad loses it, or trains on a pad."""
    mask = torch.tensor([[True, True, False, False]])
    assert token_rewards(torch.tensor([5.0]), torch.zeros(1, 4), mask, 0.1).tolist() == [[0.0, 5.0, 0.0, 0.0]]


def test_a_bootstrapped_row_pays_no_score():
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert token_rewards(torch.zeros(1), torch.ones(1, 2), mask, 0.25).tolist() == [[-0.25, -0.25]]


def test_dtype_is_that_of_the_kl():
    assert (
        token_rewards(torch.zeros(1, dtype=torch.float64), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), 0.1).dtype
        == torch.float32
    )


@given(st.integers(0, 2**31), st.floats(0, 1))
def test_token_rewards_add_up_to_the_return_of_the_sequence(seed, coef):
    generator = torch.Generator().manual_seed(seed)
    score, kl = torch.randn(4, generator=generator).double(), torch.randn(4, 6, generator=generator).double()
    mask = torch.rand(4, 6, generator=generator) > 0.4
    mask[:, 2] = True
    torch.testing.assert_close(token_rewards(score, kl, mask, coef).sum(1), sequence_returns(score, kl, mask, coef))
    by_hand = torch.stack([score[b] - coef * kl[b][mask[b]].sum() for b in range(4)])
    torch.testing.assert_close(sequence_returns(score, kl, mask, coef), by_hand)
