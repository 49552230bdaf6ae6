"""Truncated weights against the scalar formula; and the bias of a stale gradient, enumerated over all completions of a small table."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.algos.importance import importance_weights
from rlhf_dist.algos.losses import PolicyClip, policy_loss

ONE = torch.ones(1, 1, dtype=torch.bool)
CLIP = PolicyClip(0.2, 0.2)


@given(st.floats(-400, 0), st.floats(-400, 0), st.floats(1, 100))
def test_a_weight_is_the_smaller_of_ratio_and_cap(prox: float, behaviour: float, cap: float) -> None:
    got = importance_weights(*(torch.tensor([[x]], dtype=torch.float64) for x in (prox, behaviour)), ONE, cap)
    assert got.weights_BT.item() == pytest.approx(min(math.exp(prox - behaviour), cap), rel=1e-9)
    assert bool(got.truncated_BT) == (prox - behaviour > math.log(cap))


def test_a_ratio_that_overflows_is_a_cap() -> None:
    got = importance_weights(torch.zeros(1, 1), torch.full((1, 1), -500.0), ONE, 2.0)
    assert got.weights_BT.item() == pytest.approx(2.0) and bool(got.truncated_BT)


def test_weights_take_part_in_no_gradient() -> None:
    """∇(w·loss) = w·∇loss, also where the log-probs that w is made of are the ones being trained (one minibatch, one epoch)."""
    logprobs = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    behaviour, advantages = logprobs.detach() - 0.3, torch.randn(3, 4, dtype=torch.float64)
    mask = torch.ones(3, 4, dtype=torch.bool)
    importance = importance_weights(logprobs, behaviour, mask, 2.0)
    assert not importance.weights_BT.requires_grad
    plain = policy_loss(logprobs, logprobs.detach(), advantages, mask, CLIP)
    (want,) = torch.autograd.grad(plain.loss_BT.sum(), logprobs, retain_graph=True)
    (got,) = torch.autograd.grad(plain.scaled(importance.weights_BT).loss_BT.sum(), logprobs)
    torch.testing.assert_close(got, math.exp(0.3) * want)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e6])
def test_masked_slots_weigh_nothing_whatever_stands_in_them(poison: float) -> None:
    mask = torch.tensor([[True, False, True]])
    prox, behaviour = torch.tensor([[-1.0, poison, -2.0]]), torch.tensor([[-1.5, -poison, -1.0]])
    got = importance_weights(prox, behaviour, mask, 1.5)
    assert got.weights_BT.tolist() == [[1.5, 0.0, pytest.approx(math.exp(-1))]]
    assert got.truncated_BT.tolist() == [[True, False, False]]


# --- the bias of a gradient from stale samples, exactly: a table policy over four tokens, all its completions listed

VOCABULARY, TABLES = 4, 60
Table = list[torch.Tensor]
COMPLETIONS = {
    1: torch.arange(VOCABULARY).unsqueeze(1),
    2: torch.cartesian_prod(torch.arange(VOCABULARY), torch.arange(VOCABULARY)),
}


def table(seed: int, scale: float = 1.0) -> Table:
    """Logits of the first token [V], and of the second given the first [V, V]."""
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((VOCABULARY,), (VOCABULARY, VOCABULARY))]


def logprobs(policy: Table, length: int) -> torch.Tensor:
    tokens = COMPLETIONS[length]
    first = policy[0].log_softmax(-1)[tokens[:, 0]]
    second = [policy[1].log_softmax(-1)[tokens[:, 0], tokens[:, 1]]] if length == 2 else []
    return torch.stack([first, *second], 1)


def gradient(policy: Table, behaviour: Table, rewards: torch.Tensor, length: int, cap: float | None) -> torch.Tensor:
    """Expected gradient of the first minibatch over samples of `behaviour`; A = reward − mean reward of the policy that trains.

    The loss is linear in the advantage, so a completion counts as often as it would be drawn when its advantage is scaled.
    """
    policy = [x.clone().requires_grad_() for x in policy]
    new, sampled = logprobs(policy, length), logprobs(behaviour, length)
    old, mask = new.detach(), torch.ones(new.shape, dtype=torch.bool)
    advantage = rewards - (old.sum(1).exp() * rewards).sum()
    drawn = (sampled.sum(1).exp() * advantage).unsqueeze(1).expand_as(new)
    tokens = policy_loss(new, old, drawn, mask, CLIP)
    if cap is not None:
        tokens = tokens.scaled(importance_weights(old, sampled, mask, cap).weights_BT)
    grads = torch.autograd.grad(tokens.loss_BT.sum(), policy, allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def biases(length: int, distance: float, cap: float | None) -> torch.Tensor:
    """‖stale − on-policy‖ / ‖on-policy‖ of many random policies, `distance` away from the ones that sampled."""
    found = []
    for seed in range(TABLES):
        policy = table(seed)
        behaviour = [x + y for x, y in zip(policy, table(1000 + seed, distance), strict=True)]
        rewards = torch.randn(len(COMPLETIONS[length]), generator=torch.Generator().manual_seed(2000 + seed), dtype=torch.float64)
        true = gradient(policy, policy, rewards, length, None)
        found.append((gradient(policy, behaviour, rewards, length, cap) - true).norm() / true.norm())
    return torch.stack(found)


@pytest.mark.parametrize("distance", [0.2, 0.5, 1.0])
def test_without_a_cap_one_token_completions_have_no_bias_at_all(distance: float) -> None:
    assert biases(1, distance, math.inf).max() < 1e-12
    assert biases(1, distance, None).mean() > 0.5 * distance, "uncorrected, the gradient is off"


@pytest.mark.parametrize(
    ("length", "distance", "remains"), [(1, 0.2, 0.01), (1, 0.5, 0.2), (1, 1.0, 0.35), (2, 0.2, 0.75), (2, 0.5, 0.75), (2, 1.0, 0.75)]
)
def test_the_default_cap_takes_most_of_the_bias_away(length: int, distance: float, remains: float) -> None:
    """Of one-token completions nearly all of it; of two tokens what the first one's weight leaves in the prefix of the second remains."""
    plain, corrected = biases(length, distance, None), biases(length, distance, 2.0)
    assert corrected.mean() < remains * plain.mean()
    assert (corrected < plain).double().mean() > 0.8
