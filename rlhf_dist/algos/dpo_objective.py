"""The loss of a preference-trained policy on a microbatch of pairs, and its metrics (`contracts.engine.Objective`; NUMERICS section 3).

Metric names are those of TRL. All are sums over pairs with the pairs' weights, so they merge exactly over microbatches, ranks and steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_dist.algos.preference import hinge_loss, ipo_loss, robust_loss, sequence_log_ratio, sequence_logprob, sigmoid_loss
from rlhf_dist.config.dpo import DPOSection
from rlhf_dist.contracts.engine import Outputs
from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.contracts.pairs import PairBatch
from rlhf_dist.contracts.tally import Tally

TIE = 0.5


class DPOObjective:
    """One of the DPO family, on the output `logprobs_BT` of the 2B sequences of a `PairBatch`.

    With `sigmoid` a pair that has a label probability p goes by ε = 1 − p, one with a hard label by `label_smoothing`; the other losses
    read no p. IPO's log-ratios are averages over tokens, in `rewards/*` too; `logps/*` are of whole completions for all losses.
    """

    def __init__(self, config: DPOSection) -> None:
        self._loss, self._beta, self._label_smoothing = config.loss, config.beta, config.label_smoothing

    def __call__(self, outputs: Outputs, microbatch: SequenceBatch) -> tuple[Tensor, Tally]:
        """The losses summed with the pairs' weights, and the metrics.

        Raises:
            TypeError: the microbatch holds no pairs.
            ValueError: an empty completion, or a label probability outside [0.5, 1].
        """
        if not isinstance(microbatch, PairBatch):
            raise TypeError(f"DPO trains on PairBatch, not on {type(microbatch).__name__}")
        logprobs_BT, mask_BT = outputs["logprobs_BT"], microbatch.response_mask_BT
        delta_2B = sequence_log_ratio(logprobs_BT, mask_BT, microbatch.ref_logprob_2B, average=self._loss == "ipo")
        chosen_B, rejected_B = delta_2B.chunk(2)
        losses_B = self._losses(chosen_B - rejected_B, microbatch.label_probability_B)
        metrics = self._metrics(losses_B, delta_2B, sequence_logprob(logprobs_BT, mask_BT), microbatch)
        return (losses_B * microbatch.weight_B).sum().float(), metrics

    def _losses(self, h_B: Tensor, label_probability_B: Tensor) -> Tensor:
        if self._loss == "sigmoid":
            hard = torch.isnan(label_probability_B)
            return sigmoid_loss(h_B, self._beta, torch.where(hard, self._label_smoothing, 1.0 - label_probability_B))
        if self._loss == "robust":
            return robust_loss(h_B, self._beta, self._label_smoothing)
        return hinge_loss(h_B, self._beta) if self._loss == "hinge" else ipo_loss(h_B, self._beta)

    @torch.no_grad()
    def _metrics(self, losses_B: Tensor, delta_2B: Tensor, logprob_2B: Tensor, batch: PairBatch) -> Tally:
        """`rewards/*` are the implicit rewards βΔ; a margin of exactly 0 is half right, and a tie has no right side."""
        chosen_B, rejected_B = (self._beta * delta_2B).chunk(2)
        margin_B, weight_B = chosen_B - rejected_B, batch.weight_B
        logprob_chosen_B, logprob_rejected_B = logprob_2B.chunk(2)
        right_B = torch.where(margin_B == 0, 0.5, (margin_B > 0).double())
        judged_B = torch.where(batch.label_probability_B == TIE, 0.0, weight_B)
        columns = {
            "loss": (losses_B, weight_B),
            "rewards/chosen": (chosen_B, weight_B),
            "rewards/rejected": (rejected_B, weight_B),
            "rewards/margins": (margin_B, weight_B),
            "rewards/accuracies": (right_B, judged_B),
            "logps/chosen": (logprob_chosen_B, weight_B),
            "logps/rejected": (logprob_rejected_B, weight_B),
        }
        sums = torch.stack([torch.stack([(x_B * w_B).sum(), w_B.sum()]) for x_B, w_B in columns.values()]).tolist()
        tally = Tally()
        for name, (total, weight) in zip(columns, sums, strict=True):
            tally.add(name, total, weight)
        return tally
