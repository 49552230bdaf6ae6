"""Pairs as a batch: they move as a whole, and are sequences to whoever only runs a forward."""

from __future__ import annotations

import torch

from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.contracts.pairs import PairBatch


def test_it_is_a_batch_of_sequences_that_moves_whole() -> None:
    tokens, mask = torch.zeros(4, 2, dtype=torch.long), torch.ones(4, 2, dtype=torch.bool)
    batch = PairBatch(tokens, mask, tokens, mask, mask, torch.arange(4.0).double(), torch.ones(2).double(), torch.ones(2).double())
    assert isinstance(batch, SequenceBatch) and len(batch) == 4 and len(batch.weight_B) == 2
    moved = batch.to("meta")
    assert {str(tensor.device) for tensor in vars(moved).values()} == {"meta"}
