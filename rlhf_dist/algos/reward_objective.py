"""The loss of a reward model over a batch of preferences: hard pairs, soft pairs and rankings, side by side (NUMERICS section 4)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_dist.algos.ranking import all_pairs, bradley_terry, plackett_luce, soft_label
from rlhf_dist.contracts.engine import Outputs
from rlhf_dist.contracts.preferences import PreferenceBatch
from rlhf_dist.contracts.tally import Tally

RANKINGS = {"plackett_luce": plackett_luce, "all_pairs": all_pairs}


class RewardObjective:
    """Σ weight · loss over prompts (contracts.engine.Objective); `outputs["score_B"]` is one score a text.

    A pair with a hard label costs Bradley–Terry, one with a soft label binary cross-entropy, a ranking of K > 2 answers the ranking's loss.

    Args:
        ranking: loss of rankings.
        margins: whether the margin of a hard pair counts.
        centring: c in c·(2·mean score of the prompt's answers)², for a pair c·(r_c + r_r)².
    """

    def __init__(
        self, ranking: Literal["plackett_luce", "all_pairs"] = "plackett_luce", margins: bool = False, centring: float = 0.0
    ) -> None:
        self._ranking, self._margins, self._centring = RANKINGS[ranking], margins, centring

    def __call__(self, outputs: Outputs, microbatch: PreferenceBatch) -> tuple[Tensor, Tally]:
        """The loss summed over prompts, and its metrics."""
        scores_BK = microbatch.spread(outputs["score_B"])
        loss = (self._losses(scores_BK, microbatch) * microbatch.weight_B).sum()
        tally = preference_metrics(scores_BK.detach(), microbatch)
        tally.add("loss", float(loss.detach()), float(microbatch.weight_B.sum()))
        return loss, tally

    def _losses(self, scores_BK: Tensor, batch: PreferenceBatch) -> Tensor:
        ranked_B, soft_B = batch.mask_BK.sum(1) > 2, ~batch.probability_B.isnan()
        loss_B = scores_BK.new_zeros(len(batch))
        kinds = ((~ranked_B & ~soft_B, self._hard), (~ranked_B & soft_B, _soft), (ranked_B, self._ranked))
        for which_B, loss in kinds:
            if bool(which_B.any()):
                loss_B = loss_B.masked_scatter(which_B, loss(scores_BK[which_B], batch, which_B))
        if self._centring:
            loss_B = loss_B + self._centring * (2 * scores_BK.sum(1) / batch.mask_BK.sum(1)).square()
        return loss_B

    def _hard(self, scores_BK: Tensor, batch: PreferenceBatch, which_B: Tensor) -> Tensor:
        return bradley_terry(scores_BK[:, 0], scores_BK[:, 1], batch.margin_B[which_B] if self._margins else None)

    def _ranked(self, scores_BK: Tensor, batch: PreferenceBatch, which_B: Tensor) -> Tensor:
        return self._ranking(scores_BK, batch.mask_BK[which_B])


def preference_metrics(scores_BK: Tensor, batch: PreferenceBatch) -> Tally:
    """What the scores say, every prompt counting once, whatever its weight in the loss.

    `accuracy`: share of a prompt's pairs in the right order, equal scores counting half. `rewards/chosen`: of the best answer;
    `rewards/rejected`: mean of the others; `rewards/margins`: their difference. A pair that was labelled a tie (p = 0.5) counts in none of
    them; where p < 0.5 the second answer is the better one. `rewards/mean`: of all texts.
    """
    tally = Tally()
    tally.add("rewards/mean", float(scores_BK.sum()), float(batch.mask_BK.sum()))
    scores_BK = _better_first(scores_BK, batch.probability_B)
    first_B, rest_B = scores_BK[:, 0], scores_BK[:, 1:].sum(1) / (batch.mask_BK.sum(1) - 1)
    accuracy_B = _share_in_order(scores_BK, batch.mask_BK)
    values = {"accuracy": accuracy_B, "rewards/chosen": first_B, "rewards/rejected": rest_B, "rewards/margins": first_B - rest_B}
    told_B = batch.probability_B != 0.5
    for name, value_B in values.items():
        tally.add(name, float(value_B[told_B].sum()), float(told_B.sum()))
    return tally


def _better_first(scores_BK: Tensor, probability_B: Tensor) -> Tensor:
    """Pairs turned around where the label says that the second answer is more likely the better one."""
    turned_BK = scores_BK[:, [1, 0, *range(2, scores_BK.shape[1])]]
    return torch.where((probability_B < 0.5).unsqueeze(1), turned_BK, scores_BK)


def _share_in_order(scores_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """Share of each prompt's pairs whose better answer has the higher score, double [B]; equal scores count half."""
    rising = torch.ones(2 * (scores_BK.shape[1],), dtype=torch.bool, device=scores_BK.device).triu(1)
    pairs_BKK = mask_BK.unsqueeze(2) & mask_BK.unsqueeze(1) & rising
    difference_BKK = scores_BK.unsqueeze(2) - scores_BK.unsqueeze(1)
    return torch.where(pairs_BKK, (difference_BKK.sign().double() + 1) / 2, 0.0).sum((1, 2)) / pairs_BKK.sum((1, 2))


def _soft(scores_BK: Tensor, batch: PreferenceBatch, which_B: Tensor) -> Tensor:
    return soft_label(scores_BK[:, 0], scores_BK[:, 1], batch.probability_B[which_B])
