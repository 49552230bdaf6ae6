"""The DPO family: step-1 losses, fixed points, closed forms, masks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.algos.preference import hinge_loss, ipo_loss, robust_loss, sequence_log_ratio, sequence_logprob, sigmoid_loss

BETA = 0.1


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def slope(loss, h: float) -> float:
    x = f64(h).requires_grad_()
    return torch.autograd.grad(loss(x).sum(), x)[0].item()


def test_step_1_losses():
    """Policy = reference: h = 0."""
    h = f64(0.0)
    assert round(sigmoid_loss(h, BETA).item(), 6) == 0.693147
    assert round(sigmoid_loss(h, BETA, 0.2).item(), 6) == 0.693147
    assert round(robust_loss(h, BETA, 0.2).item(), 6) == 0.693147
    assert hinge_loss(h, BETA).item() == 1.0
    assert ipo_loss(h, BETA).item() == pytest.approx(1 / (4 * BETA**2))


def test_conservative_dpo_has_no_gradient_at_its_fixed_point():
    epsilon = 0.1
    rest = math.log((1 - epsilon) / epsilon) / BETA
    assert slope(lambda h: sigmoid_loss(h, BETA, epsilon), rest) == pytest.approx(0, abs=1e-15)
    assert slope(lambda h: sigmoid_loss(h, BETA, epsilon), rest - 1) < 0 < slope(lambda h: sigmoid_loss(h, BETA, epsilon), rest + 1)
    rescaled = lambda h: (1 - epsilon) * sigmoid_loss(h, BETA) + epsilon * 0.5  # noqa: E731  the form of the tutorials
    assert abs(slope(rescaled, rest)) > 1e-3


@given(st.floats(-50, 50), st.floats(0.01, 1), st.floats(0, 0.45))
def test_closed_forms(h, beta, epsilon):
    x = f64(h)
    up, down = -math.log1p(math.exp(-beta * h)), -math.log1p(math.exp(beta * h))
    assert sigmoid_loss(x, beta).item() == pytest.approx(-up)
    assert sigmoid_loss(x, beta, epsilon).item() == pytest.approx(-(1 - epsilon) * up - epsilon * down)
    assert robust_loss(x, beta, epsilon).item() == pytest.approx((-(1 - epsilon) * up + epsilon * down) / (1 - 2 * epsilon))
    assert hinge_loss(x, beta).item() == pytest.approx(max(0.0, 1 - beta * h))
    assert ipo_loss(x, beta).item() == pytest.approx((h - 1 / (2 * beta)) ** 2)


def test_robust_loss_is_unbiased_under_flipped_labels():
    h, epsilon = f64(3.0), 0.3
    noisy = (1 - epsilon) * robust_loss(h, BETA, epsilon) + epsilon * robust_loss(-h, BETA, epsilon)
    torch.testing.assert_close(noisy, sigmoid_loss(h, BETA))


def test_ipo_rests_at_its_margin():
    assert slope(lambda h: ipo_loss(h, BETA), 1 / (2 * BETA)) == 0.0


@pytest.mark.parametrize("epsilon", [-0.1, 0.5, 0.9, float("nan")])
@pytest.mark.parametrize("loss", [sigmoid_loss, robust_loss])
def test_impossible_smoothing_is_an_error(loss, epsilon):
    with pytest.raises(ValueError, match="label smoothing"):
        loss(f64(0.0), BETA, epsilon)


def test_log_ratios_are_summed_or_averaged_over_completion_tokens():
    logprobs = torch.tensor([[-1.0, -2.0, float("nan")], [-3.0, 1e6, -1.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert sequence_logprob(logprobs, mask).tolist() == [-3.0, -4.0]
    reference = f64(-6.0, -1.5)
    assert sequence_log_ratio(logprobs, mask, reference).tolist() == [3.0, -2.5]
    averaged = sequence_log_ratio(logprobs, mask, reference, average=True)
    assert averaged.tolist() == [1.5, -1.25]
    averaged.sum().backward()
    assert torch.equal(logprobs.grad, torch.where(mask, 0.5, 0.0))


def test_long_completions_keep_their_digits():
    """Float32 would be off by 1e-3 nats here, of which the loss would still show the fifth digit."""
    logprobs, mask = torch.full((1, 20_001), -1.1), torch.ones(1, 20_001, dtype=torch.bool)
    assert sequence_logprob(logprobs, mask).item() == pytest.approx(20_001 * float(logprobs[0, 0]), rel=1e-12)


def test_an_empty_completion_is_an_error():
    with pytest.raises(ValueError, match="1 of 2 completions"):
        sequence_log_ratio(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]), torch.zeros(2))


def test_every_pair_may_have_its_own_smoothing():
    h, epsilon = f64(-3.0, 0.5, 2.0), f64(0.0, 0.2, 0.5)
    each = torch.stack([sigmoid_loss(one, BETA, float(e)) for one, e in zip(h[:2], epsilon[:2], strict=True)])
    assert torch.equal(sigmoid_loss(h, BETA, epsilon)[:2], each)
    tie = -0.5 * math.log(1 / (1 + math.exp(-0.2))) - 0.5 * math.log(1 / (1 + math.exp(0.2)))
    assert sigmoid_loss(h, BETA, epsilon)[2].item() == pytest.approx(tie)
    with pytest.raises(ValueError, match="flipped label"):
        sigmoid_loss(h, BETA, f64(0.0, 0.2, 0.6))
