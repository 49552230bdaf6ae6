"""Costs by hand: products of a tiny model counted one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.contracts.flops import FlopModel

MODEL = FlopModel(linear=20.0, attention=3.0, head=8.0)


def test_a_forward_by_hand() -> None:
    assert MODEL.forward(5) == 20 * 5 + 3 * 25
    assert MODEL.forward(5, predicted=2) == 20 * 5 + 3 * 25 + 8 * 2


def test_causal_attention_is_half_of_all_products() -> None:
    """Each token against itself and those before it, twice (scores, values), two operations a product: to first order 2·d·s²."""
    layers, width, tokens = 3, 16, 1000
    counted = layers * sum(2 * 2 * width * (position + 1) for position in range(tokens))
    assert FlopModel(0.0, 2.0 * layers * width).forward(tokens) == pytest.approx(counted, rel=2e-3)


@pytest.mark.parametrize(
    ("frozen", "recomputed", "expected"),
    [(False, False, (60, 9, 24)), (False, True, (80, 12, 24)), (True, False, (40, 9, 16)), (True, True, (60, 12, 16))],
)
def test_training_is_three_forwards_or_four_where_layers_are_recomputed(
    frozen: bool, recomputed: bool, expected: tuple[float, ...]
) -> None:
    """Frozen weights take no gradient: one product of three less; attention has no weights."""
    trained = MODEL.training(frozen=frozen, recomputed=recomputed)
    assert (trained.linear, trained.attention, trained.head) == expected


@given(tokens=st.integers(1, 10**5))
def test_in_tokens_is_the_forward_with_every_log_prob_over_that_of_a_token_without_attention(tokens: int) -> None:
    assert MODEL.in_tokens(tokens) * (20 + 8) == pytest.approx(MODEL.forward(tokens, tokens))


def test_sequences_counted_together_do_not_see_each_other() -> None:
    assert MODEL.together(4).forward(4 * 7) == pytest.approx(4 * MODEL.forward(7))
