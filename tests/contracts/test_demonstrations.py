"""Weights travel with their rows."""

from __future__ import annotations

import torch

from rlhf_dist.contracts.demonstrations import DemonstrationBatch


def batch(rows: int, width: int, weight: float) -> DemonstrationBatch:
    tokens, mask = torch.ones(rows, width, dtype=torch.long), torch.ones(rows, width, dtype=torch.bool)
    return DemonstrationBatch(tokens, mask, tokens, mask, mask, weight * torch.arange(1.0, rows + 1))


def test_rows_keep_their_weights() -> None:
    both = DemonstrationBatch.concat([batch(2, 3, 1.0), batch(1, 5, 0.5)])
    assert both.weight_B.tolist() == [1.0, 2.0, 0.5] and both.response_tokens_BT.shape == (3, 5)
    assert both.select([2, 0]).weight_B.tolist() == [0.5, 1.0] and both.to("cpu").weight_B.dtype == torch.float32
