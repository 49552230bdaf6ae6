"""Preferences as tensors: answers found by prompt, and nothing heard from where there is none."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_dist.contracts.preferences import PreferenceBatch


def batch(hole: int = 0) -> PreferenceBatch:
    """A pair and a ranking of three; `hole` stands where the pair has no third answer."""
    return PreferenceBatch(
        tokens_NL=torch.arange(10).reshape(5, 2),
        mask_NL=torch.ones(5, 2, dtype=torch.bool),
        answers_BK=torch.tensor([[0, 1, hole], [2, 3, 4]]),
        mask_BK=torch.tensor([[True, True, False], [True, True, True]]),
        margin_B=torch.tensor([0.5, 0.0]),
        probability_B=torch.tensor([math.nan, math.nan]),
        weight_B=torch.ones(2),
    )


@pytest.mark.parametrize("hole", [0, 4, -1, 10**9, -(10**9)])
def test_scores_by_prompt_whatever_stands_where_there_is_no_answer(hole: int) -> None:
    value_N = torch.tensor([5.0, 6.0, 7.0, 8.0, 9.0], requires_grad=True)
    spread = batch(hole).spread(value_N)
    assert spread.tolist() == [[5.0, 6.0, 0.0], [7.0, 8.0, 9.0]]
    spread.sum().backward()
    assert value_N.grad is not None and value_N.grad.tolist() == [1.0] * 5


def test_it_has_a_length_and_moves_whole() -> None:
    moved = batch().to("cpu")
    assert len(moved) == 2 and torch.equal(moved.tokens_NL, batch().tokens_NL) and moved.weight_B.device.type == "cpu"
