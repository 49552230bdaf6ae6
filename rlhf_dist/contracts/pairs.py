"""The carrier of preference optimisation: pairs of sequences, and what the frozen reference says of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhf_dist.contracts.experience import SequenceBatch


@dataclass(frozen=True)
class PairBatch(SequenceBatch):
    """B pairs as 2B sequences: first all chosen ones, then the rejected ones in the same order. All fields are needed by a loss.

    ref_logprob_2B float64: the reference's log-probability of each completion, summed over its tokens, in nats.
    label_probability_B float64: that the chosen one is the better, 0.5 (a tie) to 1; NaN where the label is hard.
    weight_B float64: of the pair in the loss.

    Example, two pairs::

        sequences        [chosen 0, chosen 1, rejected 0, rejected 1]
        ref_logprob_2B   [  -12.5,    -31.0,     -14.0,      -29.5  ]
        weight_B         [    1,        2  ]
    """

    ref_logprob_2B: Tensor
    label_probability_B: Tensor
    weight_B: Tensor
