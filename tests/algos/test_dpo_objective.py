"""The DPO objective: sums with weights, labels hard and soft, metrics under TRL's names."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_dist.algos.dpo_objective import DPOObjective
from rlhf_dist.config.dpo import DPOSection
from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.contracts.pairs import PairBatch

NAN = math.nan
LOSSES = [DPOSection(loss="hinge"), DPOSection(loss="ipo"), DPOSection(), DPOSection(loss="robust", label_smoothing=0.2)]


def pairs(
    lengths: list[int], reference: list[float], probability: list[float] | None = None, weight: list[float] | None = None
) -> PairBatch:
    """2B sequences of the given lengths."""
    count, width = len(lengths), max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    tokens, prompt = torch.zeros(count, width, dtype=torch.long), torch.zeros(count, 1, dtype=torch.long)
    f64 = torch.float64
    return PairBatch(
        prompt, torch.ones(count, 1, dtype=torch.bool), tokens, mask, mask,
        torch.tensor(reference, dtype=f64),
        torch.tensor(probability or [NAN] * (count // 2), dtype=f64),
        torch.tensor(weight or [1.0] * (count // 2), dtype=f64),
    )  # fmt: skip


def apply(config: DPOSection, logprobs: Tensor, batch: PairBatch) -> tuple[float, dict[str, float]]:
    loss, tally = DPOObjective(config)({"logprobs_BT": logprobs}, batch)
    return float(loss), tally.means()


@pytest.mark.parametrize(
    ("config", "first"),
    [
        ({}, math.log(2)), ({"label_smoothing": 0.3}, math.log(2)), ({"loss": "robust", "label_smoothing": 0.3}, math.log(2)),
        ({"loss": "hinge"}, 1.0), ({"loss": "ipo", "beta": 0.2}, 6.25),
    ],
)  # fmt: skip
def test_the_first_loss(config: dict[str, Any], first: float) -> None:
    """Policy = reference."""
    logprobs, mask = torch.randn(4, 3), torch.arange(3) < torch.tensor([[3], [1], [2], [3]])
    reference = torch.where(mask, logprobs, 0.0).double().sum(1).tolist()
    loss, metrics = apply(DPOSection(**config), logprobs, pairs([3, 1, 2, 3], reference))
    assert loss == pytest.approx(2 * first) and metrics["loss"] == pytest.approx(first, abs=1e-12)
    assert metrics["rewards/margins"] == 0.0 and metrics["rewards/accuracies"] == 0.5


def test_losses_and_metrics_by_hand() -> None:
    """Δ of the chosen: 1 and −2; of the rejected: −1 and 0. Weights 1 and 3."""
    logprobs = torch.tensor([[-1.0, -1.0], [-5.0, NAN], [-2.0, -1.0], [-3.0, NAN]])
    batch = pairs([2, 1, 2, 1], [-3.0, -3.0, -2.0, -3.0], weight=[1.0, 3.0])
    loss, metrics = apply(DPOSection(beta=0.5), logprobs, batch)
    each = [math.log1p(math.exp(-0.5 * h)) for h in (2.0, -2.0)]
    assert loss == pytest.approx(each[0] + 3 * each[1]) and metrics["loss"] == pytest.approx(loss / 4)
    assert metrics["rewards/chosen"] == pytest.approx(0.5 * (1 - 3 * 2) / 4) and metrics["rewards/rejected"] == pytest.approx(-0.125)
    assert metrics["rewards/margins"] == pytest.approx((1.0 - 3.0) / 4) and metrics["rewards/accuracies"] == 0.25
    assert metrics["logps/chosen"] == pytest.approx((-2 - 15) / 4) and metrics["logps/rejected"] == pytest.approx((-3 - 9) / 4)
    assert set(metrics) == {
        "loss",
        *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
        "logps/chosen",
        "logps/rejected",
    }


def test_ipo_averages_over_tokens() -> None:
    logprobs = torch.tensor([[-1.0, -1.0], [-4.0, NAN]])
    loss, metrics = apply(DPOSection(loss="ipo", beta=0.5), logprobs, pairs([2, 1], [-3.0, -3.0]))
    assert loss == pytest.approx((0.5 + 1.0 - 1.0) ** 2)
    assert metrics["rewards/chosen"] == 0.25 and metrics["logps/chosen"] == -2.0, "log-probs are of whole completions"


def test_conservative_dpo_rests_where_the_label_says() -> None:
    """ε = 0.1 for hard labels; a pair of probability 0.8 rests at log(0.8 / 0.2), a tie at 0."""
    beta = 0.1
    at = {NAN: math.log(9), 0.8: math.log(4), 0.5: 0.0, 1.0: 50.0}
    for probability, rest in at.items():
        logprobs = torch.tensor([[rest / beta], [0.0]], requires_grad=True)
        loss, _ = DPOObjective(DPOSection(label_smoothing=0.1))({"logprobs_BT": logprobs}, pairs([1, 1], [0.0, 0.0], [probability]))
        loss.backward()
        assert logprobs.grad is not None and float(logprobs.grad.abs().max()) < 1e-8, probability


@pytest.mark.parametrize("config", [c for c in LOSSES if c.loss != "sigmoid"], ids=lambda c: c.loss)
def test_other_losses_read_no_probabilities(config: DPOSection) -> None:
    logprobs = torch.tensor([[-1.0], [-2.0]])
    assert apply(config, logprobs, pairs([1, 1], [0.0, 0.0], [0.7]))[0] == apply(config, logprobs, pairs([1, 1], [0.0, 0.0]))[0]


def test_a_tie_has_no_right_side() -> None:
    logprobs = torch.tensor([[-1.0], [-2.0], [-2.0], [-1.0]])
    _, metrics = apply(DPOSection(), logprobs, pairs([1] * 4, [0.0] * 4, [0.9, 0.5]))
    assert metrics["rewards/accuracies"] == 1.0
    assert "rewards/accuracies" not in apply(DPOSection(), logprobs[[1, 3]], pairs([1] * 2, [0.0] * 2, [0.5]))[1]


def test_only_pairs_are_taken() -> None:
    sequences = pairs([1, 1], [0.0, 0.0])
    plain = SequenceBatch(*list(vars(sequences).values())[:5])
    with pytest.raises(TypeError, match="PairBatch, not on SequenceBatch"):
        DPOObjective(DPOSection())({"logprobs_BT": torch.zeros(2, 1)}, plain)
    with pytest.raises(ValueError, match="1 of 2 completions"):
        apply(DPOSection(), torch.zeros(2, 1), pairs([1, 0], [0.0, 0.0]))


@pytest.mark.parametrize("config", LOSSES, ids=lambda c: c.loss)
def test_microbatches_add_up(config: DPOSection) -> None:
    torch.manual_seed(0)
    lengths, reference, weight = [3, 1, 2, 2, 3, 1], [-4.0, -1.0, -3.0, -2.0, -4.5, -2.0], [1.0, 2.0, 0.5]
    logprobs = -torch.rand(6, 3)
    whole, metrics = apply(config, logprobs, pairs(lengths, reference, weight=weight))
    total, merged = 0.0, None
    for rows in ([0, 3], [1, 2, 4, 5]):
        part = pairs([lengths[r] for r in rows], [reference[r] for r in rows], weight=[weight[r] for r in rows[: len(rows) // 2]])
        loss, tally = DPOObjective(config)({"logprobs_BT": logprobs[rows]}, part)
        total += float(loss)
        if merged is None:
            merged = tally
        else:
            merged.merge(tally)
    assert merged is not None and total == pytest.approx(whole) and merged.means() == pytest.approx(metrics)
