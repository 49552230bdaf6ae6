"""Reward-model losses: golden values, slow references, masks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.algos.ranking import all_pairs, bradley_terry, plackett_luce, soft_label

CHOSEN, REJECTED = (torch.tensor(x, dtype=torch.float64) for x in ([1.2, -0.3, 0.5], [0.7, 0.4, -1.0]))
SCORES = torch.tensor([[2.0, 1.0, 0.5, -1.0]], dtype=torch.float64)
ALL = torch.ones(1, 4, dtype=torch.bool)


def test_bradley_terry_golden_values():
    margins = torch.tensor([0.1, 0.2, 0.0], dtype=torch.float64)
    assert round(bradley_terry(CHOSEN, REJECTED).mean().item(), 6) == 0.592892
    assert round(bradley_terry(CHOSEN, REJECTED, margins).mean().item(), 6) == 0.651861
    assert round(bradley_terry(CHOSEN, REJECTED, centring=0.01).mean().item(), 6) == 0.605792


def test_ranking_golden_values():
    assert round(all_pairs(SCORES, ALL).item(), 6) == 0.227613
    assert round(plackett_luce(SCORES, ALL).item(), 6) == 1.251552


def slow_pairs(scores):
    losses = [math.log1p(math.exp(b - a)) for a, b in itertools.combinations(scores, 2)]
    return sum(losses) / len(losses)


def slow_plackett_luce(scores):
    return sum(math.log(sum(math.exp(s) for s in scores[k:])) - scores[k] for k in range(len(scores)))


@given(st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=5), min_size=1, max_size=4))
def test_ragged_rankings_against_slow_loops(rankings):
    width = max(len(r) for r in rankings)
    scores = torch.tensor([r + [float("nan")] * (width - len(r)) for r in rankings], dtype=torch.float64, requires_grad=True)
    mask = torch.arange(width) < torch.tensor([[len(r)] for r in rankings])
    pairs, choices = all_pairs(scores, mask), plackett_luce(scores, mask)
    for b, ranking in enumerate(rankings):
        assert pairs[b].item() == pytest.approx(slow_pairs(ranking))
        assert choices[b].item() == pytest.approx(slow_plackett_luce(ranking), abs=1e-12)
    (gradient,) = torch.autograd.grad(pairs.sum() + choices.sum(), scores)
    assert torch.isfinite(gradient).all() and not gradient[~mask].any()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_no_nan_arises_even_where_it_would_be_masked():
    scores = torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    with torch.autograd.detect_anomaly():
        (all_pairs(scores, mask).sum() + plackett_luce(scores, mask).sum()).backward()
    assert torch.isfinite(scores.grad).all()


def test_two_answers_are_a_pair_in_every_form():
    pair, mask = torch.stack([CHOSEN, REJECTED], 1), torch.ones(3, 2, dtype=torch.bool)
    want = bradley_terry(CHOSEN, REJECTED)
    torch.testing.assert_close(all_pairs(pair, mask), want)
    torch.testing.assert_close(plackett_luce(pair, mask), want)
    torch.testing.assert_close(soft_label(CHOSEN, REJECTED, torch.ones_like(CHOSEN)), want)


def test_only_centring_sees_a_common_shift():
    torch.testing.assert_close(bradley_terry(CHOSEN + 5, REJECTED + 5), bradley_terry(CHOSEN, REJECTED))
    assert (bradley_terry(CHOSEN + 5, REJECTED + 5, centring=0.01) > bradley_terry(CHOSEN, REJECTED, centring=0.01)).all()


@pytest.mark.parametrize("loss", [all_pairs, plackett_luce])
def test_a_ranking_of_one_is_an_error(loss):
    with pytest.raises(ValueError, match="1 of 2 prompts"):
        loss(torch.zeros(2, 3), torch.tensor([[True, True, False], [True, False, False]]))


def test_soft_labels_rest_where_the_model_agrees():
    preference = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    a, b = torch.logit(preference).requires_grad_(), torch.zeros(3, dtype=torch.float64)
    loss = soft_label(a, b, preference)
    torch.testing.assert_close(loss.detach(), -(preference * preference.log() + (1 - preference) * (1 - preference).log()))
    assert torch.autograd.grad(loss.sum(), a)[0].abs().max() < 1e-15


@pytest.mark.parametrize("preference", [-0.1, 1.1, float("nan")])
def test_a_soft_label_is_a_probability(preference):
    with pytest.raises(ValueError, match="probability"):
        soft_label(torch.zeros(1), torch.zeros(1), torch.tensor([preference]))
