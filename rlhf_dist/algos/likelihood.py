"""The likelihood of given tokens: the loss of supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from rlhf_dist.algos.masking import masked
from rlhf_dist.contracts.demonstrations import DemonstrationBatch
from rlhf_dist.contracts.engine import Outputs
from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.contracts.tally import Tally


def nll_objective(outputs: Outputs, microbatch: SequenceBatch) -> tuple[Tensor, Tally]:
    """Negative log-likelihood summed over valid tokens with the weights of their rows, in nats; its weighted token mean is the metric
    `loss` (contracts.engine.Objective).

    Raises:
        TypeError: the microbatch has no weights.
    """
    if not isinstance(microbatch, DemonstrationBatch):
        raise TypeError(f"the likelihood is weighted row by row, and a {type(microbatch).__name__} has no weights")
    logprob_B = masked(outputs["logprobs_BT"], microbatch.response_mask_BT).sum(1)
    loss = -(logprob_B * microbatch.weight_B).sum()
    tally = Tally()
    tally.add("loss", float(loss.detach()), float((microbatch.valid_tokens_B * microbatch.weight_B).sum()))
    return loss, tally
