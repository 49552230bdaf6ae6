"""The likelihood of given tokens: the loss of supervised fine-tuning and of language modelling."""

from __future__ import annotations

from torch import Tensor

from rlhf_dist.algos.masking import masked_sum
from rlhf_dist.contracts.engine import Outputs
from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.contracts.tally import Tally


def nll_objective(outputs: Outputs, microbatch: SequenceBatch) -> tuple[Tensor, Tally]:
    """Negative log-likelihood summed over valid tokens, in nats; its token mean is the metric `loss` (contracts.engine.Objective)."""
    loss = -masked_sum(outputs["logprobs_BT"], microbatch.response_mask_BT)
    tally = Tally()
    tally.add("loss", float(loss.detach()), float(microbatch.response_mask_BT.sum()))
    return loss, tally
