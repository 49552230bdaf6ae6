"""Clipped losses against a plain Python reference, the identities of the first minibatch, and the reductions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.algos.losses import PolicyClip, denominator, log_ratio, policy_loss, token_weights, value_loss

CLIP = PolicyClip(0.2, 0.28)
ONES = torch.ones(1, 1, dtype=torch.bool)


def one(new, old, advantage, clip=CLIP):
    return policy_loss(*(torch.tensor([[float(x)]], dtype=torch.float64) for x in (new, old, advantage)), ONES, clip)


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-5, 5), st.sampled_from([None, 1.5, 3.0]))
def test_policy_loss_equals_the_scalar_formula(new, old, advantage, dual):
    ratio = math.exp(new - old)
    plain, clipped = -advantage * ratio, -advantage * min(max(ratio, 0.8), 1.28)
    want = max(plain, clipped)
    if dual is not None and advantage < 0:
        want = min(want, -advantage * dual)
    got = one(new, old, advantage, PolicyClip(0.2, 0.28, dual))
    assert got.loss_BT.item() == pytest.approx(want, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (1.5, 1.0, -1.28, 0.0, True),  # good token, already likelier by enough: no gradient
        (1.5, -1.0, 1.5, 1.5, False),  # bad token, likelier: pushed down, unbounded
        (0.5, 1.0, -0.5, -0.5, False),
        (0.5, -1.0, 0.8, 0.0, True),
        (1.1, 1.0, -1.1, -1.1, False),
    ],
)
def test_the_four_corners_of_the_clip(ratio, advantage, loss, slope, clipped):
    new = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    tokens = policy_loss(new, torch.zeros(1, 1), torch.full((1, 1), advantage), ONES, CLIP)
    (gradient,) = torch.autograd.grad(tokens.loss_BT.sum(), new)
    assert tokens.loss_BT.item() == pytest.approx(loss) and gradient.item() == pytest.approx(slope)
    assert bool(tokens.clipped_BT) is clipped


def test_dual_clip_bounds_the_loss_and_stops_the_gradient():
    new = torch.tensor([[3.0]], requires_grad=True)
    tokens = policy_loss(new, torch.zeros(1, 1), torch.full((1, 1), -2.0), ONES, PolicyClip(0.2, 0.2, dual=3.0))
    assert tokens.loss_BT.item() == 6.0
    assert torch.autograd.grad(tokens.loss_BT.sum(), new)[0].item() == 0.0


def random_batch(seed=0, rows=4, width=6):
    generator = torch.Generator().manual_seed(seed)
    new, old, advantages = (torch.randn(rows, width, dtype=torch.float64, generator=generator) for _ in range(3))
    mask = torch.rand(rows, width, generator=generator) > 0.3
    mask[:, 0] = True
    return new, old, advantages, mask


def test_first_minibatch_identities():
    """ρ ≡ 1, loss = −mean(A), clip fraction 0."""
    new, _, advantages, mask = random_batch()
    tokens = policy_loss(new, new.detach(), advantages, mask, CLIP)
    assert torch.equal(log_ratio(new, new, mask).exp(), torch.ones_like(new))
    assert tokens.weighted_sum(token_weights(mask, "token_mean")) / mask.sum() == pytest.approx(-advantages[mask].mean().item())
    assert not tokens.clipped_BT.any()


def test_first_minibatch_gradient_is_that_of_a2c():
    """−A·log π + ½(V−R)² has the gradient of PPO's first minibatch."""
    logits, _, advantages, mask = random_batch(1)
    logits, values, returns = logits.requires_grad_(), torch.randn_like(logits).requires_grad_(), torch.randn_like(logits)
    ppo = policy_loss(logits, logits.detach(), advantages, mask, CLIP).loss_BT.sum()
    ppo = ppo + value_loss(values, values.detach(), returns, mask, 0.2).loss_BT.sum()
    a2c = (-advantages * logits + 0.5 * (values - returns) ** 2)[mask].sum()
    for got, want in zip(torch.autograd.grad(ppo, [logits, values]), torch.autograd.grad(a2c, [logits, values]), strict=True):
        torch.testing.assert_close(got, want)


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3))
def test_value_loss_equals_the_scalar_formula(value, old, target):
    clipped = min(max(value, old - 0.2), old + 0.2)
    x = [torch.tensor([[v]], dtype=torch.float64) for v in (value, old, target)]
    got = value_loss(*x, ONES, 0.2)
    assert got.loss_BT.item() == pytest.approx(0.5 * max((value - target) ** 2, (clipped - target) ** 2), abs=1e-12)
    assert bool(got.clipped_BT) == ((clipped - target) ** 2 > (value - target) ** 2)
    assert value_loss(*x, ONES, None).loss_BT.item() == pytest.approx(0.5 * (value - target) ** 2, abs=1e-12)


def test_scaling_changes_loss_and_gradient_of_each_token_by_its_weight():
    new, old, advantages, mask = random_batch(3)
    new = new.requires_grad_()
    tokens, weights = policy_loss(new, old, advantages, mask, CLIP), torch.rand_like(old)
    (plain,) = torch.autograd.grad(tokens.loss_BT.sum(), new, retain_graph=True)
    scaled = tokens.scaled(weights)
    assert torch.equal(scaled.loss_BT, weights * tokens.loss_BT) and torch.equal(scaled.clipped_BT, tokens.clipped_BT)
    torch.testing.assert_close(torch.autograd.grad(scaled.loss_BT.sum(), new)[0], weights * plain)


def test_value_clip_stops_a_step_that_went_too_far():
    values = torch.tensor([[1.0]], requires_grad=True)
    tokens = value_loss(values, torch.zeros(1, 1), torch.tensor([[2.0]]), ONES, 0.2)
    assert tokens.loss_BT.item() == pytest.approx(0.5 * 1.8**2) and bool(tokens.clipped_BT)
    assert torch.autograd.grad(tokens.loss_BT.sum(), values)[0].item() == 0.0


MASK = torch.tensor([[True, True, False, True], [True, False, False, False], [False, False, False, False]])


def test_token_weights():
    assert token_weights(MASK, "token_mean").tolist() == token_weights(MASK, "fixed").tolist() == MASK.float().tolist()
    assert token_weights(MASK, "sequence_mean").tolist() == [
        [pytest.approx(1 / 3)] * 2 + [0.0, pytest.approx(1 / 3)],
        [1.0, 0.0, 0.0, 0.0],
        [0.0] * 4,
    ]


def test_denominators():
    lengths = [3, 1, 0]
    assert denominator(lengths, "token_mean", 8) == 4.0
    assert denominator(lengths, "sequence_mean", 8) == 2.0
    assert denominator(lengths, "fixed", 8) == 16.0
    for nothing in ([], [0, 0]):
        with pytest.raises(ValueError, match="no valid token"):
            denominator(nothing, "token_mean", 8)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "fixed"])
def test_reductions_by_their_names(reduction):
    """On two ragged rows: mean over tokens, mean of row means, sum over a constant."""
    new, old, advantages, _ = random_batch(2, rows=2, width=4)
    tokens = policy_loss(new, old, advantages, MASK[:2], CLIP)
    rows = [tokens.loss_BT[b][MASK[b]] for b in range(2)]
    want = {
        "token_mean": torch.cat(rows).mean(),
        "sequence_mean": (rows[0].mean() + rows[1].mean()) / 2,
        "fixed": torch.cat(rows).sum() / (2 * 8),
    }[reduction]
    torch.testing.assert_close(
        tokens.weighted_sum(token_weights(MASK[:2], reduction)) / denominator([3, 1], reduction, 8), want, rtol=1e-7, atol=0
    )
