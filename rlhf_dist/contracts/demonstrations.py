"""The carrier of supervised fine-tuning: sequences, and how much each counts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhf_dist.contracts.experience import SequenceBatch


@dataclass(frozen=True)
class DemonstrationBatch(SequenceBatch):
    """Sequences to imitate.

    weight_B float32: of every trained token of the row in the loss, Σ w Σ_t nll / Σ w n: weight 2 is the row twice.
    """

    weight_B: Tensor
