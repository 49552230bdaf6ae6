"""KL estimators checked by exact enumeration of small distributions, and the adaptive coefficient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.algos.kl import k1, k2, k3, next_kl_coef

GENERATOR = torch.Generator().manual_seed(7)
LOGITS = torch.randn(5, dtype=torch.float64, generator=GENERATOR)
REF = torch.randn(5, dtype=torch.float64, generator=GENERATOR).log_softmax(0)


def gradient(function) -> torch.Tensor:
    logits = LOGITS.clone().requires_grad_()
    function(logits.log_softmax(0)).backward()
    return logits.grad


def as_loss(estimator):
    """Gradient of the estimator, averaged over the sampling distribution, which is held fixed as in practice."""
    return gradient(lambda logp: (logp.detach().exp() * estimator(logp - REF)).sum())


def as_reward(estimator):
    """Score-function gradient of the expected (detached) estimator."""
    return gradient(lambda logp: (logp.detach().exp() * estimator(logp.detach() - REF) * logp).sum())


FORWARD = gradient(lambda logp: (logp.exp() * (logp - REF)).sum())  # ∇KL(π‖π_ref)
REVERSE = gradient(lambda logp: (REF.exp() * (REF - logp)).sum())  # ∇KL(π_ref‖π)


def test_k1_and_k3_are_unbiased_k2_is_not():
    logp = LOGITS.log_softmax(0)
    pi, delta = logp.exp(), logp - REF
    kl = torch.nn.functional.kl_div(REF, logp, log_target=True, reduction="sum")
    torch.testing.assert_close((pi * k1(delta)).sum(), kl)
    torch.testing.assert_close((pi * k3(delta)).sum(), kl)
    assert abs((pi * k2(delta)).sum() - kl) > 1e-2 * kl


def test_k1_as_a_loss_has_zero_expected_gradient():
    assert as_loss(k1).abs().max() < 1e-14


def test_k1_in_the_reward_and_k2_as_a_loss_give_the_true_gradient():
    torch.testing.assert_close(as_reward(k1), FORWARD)
    torch.testing.assert_close(as_loss(k2), FORWARD)


def test_k3_as_a_loss_follows_the_other_direction_and_is_biased_in_the_reward():
    torch.testing.assert_close(as_loss(k3), REVERSE)
    torch.testing.assert_close(as_reward(k3), FORWARD - REVERSE)
    assert (as_reward(k3) - FORWARD).abs().max() > 1e-2


def test_of_sequences_only_k2_of_the_summed_delta_gives_the_true_gradient():
    """Two tokens, the second conditioned on the first, all sequences enumerated."""
    first, second = (torch.randn(*shape, dtype=torch.float64, generator=GENERATOR) for shape in ((3,), (3, 3)))
    ref_first, ref_second = (torch.randn_like(x).log_softmax(-1) for x in (first, second))

    def gradients(loss):
        logits = [first.clone().requires_grad_(), second.clone().requires_grad_()]
        a, b = logits[0].log_softmax(-1).unsqueeze(1), logits[1].log_softmax(-1)
        loss(a + b, a - ref_first.unsqueeze(1), b - ref_second).backward()
        return torch.cat([x.grad.flatten() for x in logits])

    true = gradients(lambda logp, da, db: (logp.exp() * (da + db)).sum())
    summed = gradients(lambda logp, da, db: (logp.detach().exp() * k2(da + db)).sum())
    per_token = gradients(lambda logp, da, db: (logp.detach().exp() * (k2(da) + k2(db))).sum())
    torch.testing.assert_close(summed, true)
    assert (per_token - true).abs().max() > 1e-3


@given(st.floats(-20, 20))
def test_closed_forms_and_signs(delta):
    x = torch.tensor(delta, dtype=torch.float64)
    assert k1(x).item() == delta
    assert k2(x).item() == pytest.approx(delta**2 / 2)
    assert k3(x).item() == pytest.approx(math.exp(-delta) - 1 + delta, rel=1e-9, abs=1e-9)
    assert k2(x) >= 0 and k3(x) >= 0


def test_k3_keeps_its_precision_near_zero():
    assert k3(torch.tensor(1e-4)).item() == pytest.approx(5e-9, rel=0.01)
    assert k3(torch.tensor(0.0)).item() == 0.0


def test_adaptive_coefficient_golden_values():
    coefs, coef = [], 0.2
    for observed in (3, 6, 9, 100):
        coef = next_kl_coef(coef, observed, 256, target=6, horizon=10000)
        coefs.append(round(coef, 6))
    assert coefs == [0.198976, 0.198976, 0.199995, 0.201019]


def test_adaptive_coefficient_moves_towards_the_target_and_by_at_most_a_fifth():
    assert next_kl_coef(0.1, 6.6, 100, 6.0, 1000) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert next_kl_coef(0.1, 1e9, 1000, 6.0, 1000) == pytest.approx(0.12)
    assert next_kl_coef(0.1, -1e9, 1000, 6.0, 1000) == pytest.approx(0.08)


@pytest.mark.parametrize("observed", [float("nan"), float("inf")])
def test_a_broken_kl_is_an_error(observed):
    with pytest.raises(ValueError, match="KL controller"):
        next_kl_coef(0.2, observed, 8, 6, 10000)
