"""From a padded batch to the tensors a Hugging Face forward takes. What stands in a padded slot never gets in."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_dist.contracts.experience import SequenceBatch


def model_inputs(batch: SequenceBatch) -> dict[str, Tensor]:
    """Token ids, attention mask and positions of prompt + response, each int64 or bool [B, P + T].

    Padded slots are fed id 0 at position 0; real tokens count from 0 (position = cumsum(mask) − mask, NUMERICS §1).
    """
    attention_BL = torch.cat([batch.prompt_mask_BP, batch.response_attention_BT], dim=1).bool()
    tokens_BL = torch.cat([batch.prompt_tokens_BP, batch.response_tokens_BT], dim=1)
    ones_BL = attention_BL.long()
    return {
        "input_ids": torch.where(attention_BL, tokens_BL, 0),
        "attention_mask": attention_BL,
        "position_ids": torch.where(attention_BL, ones_BL.cumsum(1) - ones_BL, 0),
    }


def blank_batch() -> SequenceBatch:
    """One prompt token and one response token that count for nothing: what a rank forwards when it has no rows left."""
    one = torch.ones(1, 1, dtype=torch.bool)
    zero = torch.zeros(1, 1, dtype=torch.long)
    return SequenceBatch(zero, one, zero.clone(), torch.zeros(1, 1, dtype=torch.bool), one.clone())
