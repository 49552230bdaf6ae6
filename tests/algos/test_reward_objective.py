"""The loss of a batch of mixed preferences is that of its rows, and its metrics are counted by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_dist.algos.ranking import all_pairs, bradley_terry, plackett_luce, soft_label
from rlhf_dist.algos.reward_objective import RewardObjective
from rlhf_dist.contracts.preferences import PreferenceBatch

NAN = math.nan


def batch(
    scores: list[list[float]], margin: Any = None, probability: Any = None, weight: Any = None
) -> tuple[dict[str, Tensor], PreferenceBatch]:
    """Rows of scores, best first, as outputs and batch."""
    width, counts = max(map(len, scores)), torch.tensor([len(row) for row in scores])
    mask = torch.arange(width) < counts[:, None]
    index = (counts.cumsum(0) - counts)[:, None] + torch.arange(width)
    flat = torch.tensor([score for row in scores for score in row], dtype=torch.float64, requires_grad=True)
    count = len(scores)
    return {"score_B": flat}, PreferenceBatch(
        torch.zeros(len(flat), 1, dtype=torch.long),
        torch.ones(len(flat), 1, dtype=torch.bool),
        torch.where(mask, index, -7),
        mask,
        torch.tensor(margin or [0.0] * count, dtype=torch.float64),
        torch.tensor(probability or [NAN] * count, dtype=torch.float64),
        torch.tensor(weight or [1.0] * count, dtype=torch.float64),
    )


CHOSEN, REJECTED = [1.2, -0.3, 0.5], [0.7, 0.4, -1.0]
PAIRS = [list(pair) for pair in zip(CHOSEN, REJECTED, strict=True)]


@pytest.mark.parametrize(
    ("options", "margin", "golden"),
    [
        ({}, None, 0.592892),
        ({"margins": True}, [0.1, 0.2, 0.0], 0.651861),
        ({"margins": False}, [0.1, 0.2, 0.0], 0.592892),
        ({"centring": 0.01}, None, 0.605792),
    ],
)
def test_golden_values_of_pairs(options: dict[str, Any], margin: Any, golden: float) -> None:
    loss, tally = RewardObjective(**options)(*batch(PAIRS, margin))
    assert round(loss.item() / 3, 6) == golden and tally.means()["loss"] == pytest.approx(loss.item() / 3)


@pytest.mark.parametrize(("ranking", "golden"), [("all_pairs", 0.227613), ("plackett_luce", 1.251552)])
def test_golden_values_of_rankings(ranking: Any, golden: float) -> None:
    assert round(RewardObjective(ranking)(*batch([[2.0, 1.0, 0.5, -1.0]]))[0].item(), 6) == golden


@pytest.mark.parametrize("ranking", ["all_pairs", "plackett_luce"])
def test_a_mixed_batch_is_the_weighted_sum_of_its_rows(ranking: Any) -> None:
    scores = [[1.0, 0.2], [0.3, 0.9], [2.0, 1.0, -0.5], [0.1, 0.4, 0.0, 2.0]]
    given = {"margin": [0.5, 9.0, 0.0, 0.0], "probability": [NAN, 0.8, NAN, NAN], "weight": [1.0, 2.0, 0.5, 3.0]}
    outputs, whole = batch(scores, **given)
    loss, tally = RewardObjective(ranking, margins=True, centring=0.1)(outputs, whole)

    def alone(function: Any, row: list[float]) -> float:
        return float(function(torch.tensor([row], dtype=torch.float64), torch.ones(1, len(row), dtype=torch.bool)))

    one = torch.tensor(scores[0], dtype=torch.float64)
    ranked = {"all_pairs": all_pairs, "plackett_luce": plackett_luce}[ranking]
    parts = [
        float(bradley_terry(one[:1], one[1:], torch.tensor([0.5]))) + 0.1 * 1.2**2,
        float(soft_label(*torch.tensor(scores[1], dtype=torch.float64)[:, None], torch.tensor([0.8], dtype=torch.float64))) + 0.1 * 1.2**2,
        alone(ranked, scores[2]) + 0.1 * (2 * 2.5 / 3) ** 2,
        alone(ranked, scores[3]) + 0.1 * (2 * 2.5 / 4) ** 2,
    ]
    expected = sum(part * weight for part, weight in zip(parts, given["weight"], strict=True))
    assert loss.item() == pytest.approx(expected)
    assert (tally.sums["loss"], tally.weights["loss"]) == (pytest.approx(expected), 6.5)
    loss.backward()
    assert outputs["score_B"].grad is not None and bool((outputs["score_B"].grad != 0).all())


@pytest.mark.parametrize("ranking", ["all_pairs", "plackett_luce"])
def test_a_ranking_of_two_is_a_pair_beside_longer_ones(ranking: Any) -> None:
    pair, three = [0.4, 0.9], [1.0, 0.5, 0.0]
    together = RewardObjective(ranking)(*batch([pair, three]))[0].item()
    assert together == pytest.approx(math.log1p(math.exp(0.5)) + RewardObjective(ranking)(*batch([three]))[0].item())


def test_metrics_by_hand() -> None:
    """Right, wrong, equal; a ranking with two of three pairs in order."""
    tally = RewardObjective()(*batch([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0], [1.0, 2.0, -3.0]], weight=[5.0, 1.0, 1.0, 1.0]))[1]
    means = tally.means()
    assert means["accuracy"] == pytest.approx((1 + 0 + 0.5 + 2 / 3) / 4), "whatever the weights"
    assert means["rewards/chosen"] == pytest.approx((1 + 0 + 2 + 1) / 4)
    assert means["rewards/rejected"] == pytest.approx((0 + 3 + 2 - 0.5) / 4)
    assert means["rewards/margins"] == pytest.approx(means["rewards/chosen"] - means["rewards/rejected"])
    assert means["rewards/mean"] == pytest.approx((1 + 3 + 4 + 0) / 9)


def test_ties_count_in_the_loss_alone_and_unlikely_labels_are_turned_around() -> None:
    tally = RewardObjective()(*batch([[1.0, 0.0], [0.25, 3.0], [9.0, 1.0]], probability=[0.9, 0.1, 0.5]))[1]
    means = tally.means()
    assert means["accuracy"] == 1.0 and tally.weights["accuracy"] == 2.0 and tally.weights["loss"] == 3.0
    assert (means["rewards/chosen"], means["rewards/rejected"]) == (2.0, 0.125)
    only_ties = RewardObjective()(*batch([[9.0, 1.0]], probability=[0.5]))[1].means()
    assert set(only_ties) == {"loss", "rewards/mean"}, "no metric of nothing"
