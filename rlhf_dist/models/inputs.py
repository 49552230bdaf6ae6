"""From a padded batch to the tensors a Hugging Face forward takes. What stands in a padded slot never gets in.

A batch pads prompts on the left and responses on the right. A forward needs neither gap: here each row is closed up and stands at the
right edge, so that the forward is as wide as the longest row and not as the longest prompt and the longest response together.

Example, prompts of 1 and 3 tokens, responses of 2 and 1::

    batch   [[ .  .  5 | 6  7], [1  2  3 | 4  .]]
    inputs  [[ .  5  6  7], [1  2  3  4]]            places_BT  [[2, 3], [3, *]]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.contracts.experience import SequenceBatch

HALF_PRECISION_STEP = 16
"""In bf16 and fp16 rows are as long as a multiple of this: attention kernels round differently at odd widths, and a row would then depend
on its neighbours (seen on CPU: log-probs up to 0.3 apart at any width, equal at multiples of 16)."""


def width_step(module: nn.Module) -> int:
    """What the width of a module's inputs must be a multiple of."""
    return 1 if next(module.parameters()).dtype == torch.float32 else HALF_PRECISION_STEP


def model_inputs(batch: SequenceBatch, step: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of a forward, and where in them the response tokens stand.

    Args:
        batch: padded anyhow.
        step: L is rounded up to a multiple of this.

    Returns:
        input_ids int64, attention_mask bool, position_ids int64, each [B, L], L tokens in the longest row. Padded slots are fed id 0 at
        position 0; real tokens count from 0 (position = cumsum(mask) − mask, NUMERICS §1).
        places_BT int64: the column of each response token; for padded slots some column.
    """
    attention_BS = torch.cat([batch.prompt_mask_BP, batch.response_attention_BT], dim=1).bool()
    tokens_BS = torch.cat([batch.prompt_tokens_BP, batch.response_tokens_BT], dim=1)
    length = -(-int(attention_BS.sum(1).max()) // step) * step
    missing = length - attention_BS.shape[1]
    if missing > 0:
        attention_BS, tokens_BS = (torch.nn.functional.pad(each, (missing, 0)) for each in (attention_BS, tokens_BS))
    order_BS = attention_BS.byte().argsort(dim=1, stable=True)  # padding first, then the tokens as they stand
    order_BL = order_BS[:, order_BS.shape[1] - length :]
    attention_BL = attention_BS.gather(1, order_BL)
    count_BL = attention_BL.long().cumsum(1)
    inputs = {
        "input_ids": torch.where(attention_BL, tokens_BS.gather(1, order_BL), 0),
        "attention_mask": attention_BL,
        "position_ids": torch.where(attention_BL, count_BL - 1, 0),
    }
    columns_BS = order_BS.argsort(dim=1) - (order_BS.shape[1] - length)
    return inputs, columns_BS[:, columns_BS.shape[1] - batch.response_tokens_BT.shape[1] :].clamp(min=0)


def to_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a module's forward, tensors and dicts of them, on a device."""
    return {name: to_device(value, device) if isinstance(value, dict) else value.to(device) for name, value in inputs.items()}


def response_slots(batch: SequenceBatch, inputs: dict[str, Tensor], places_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The slots of the response tokens alone: what a head must look at.

    Args:
        batch: as given to `model_inputs`. inputs, places_BT: what that returned.

    Returns:
        slots_N int64: of every response token its slot in the flattened rows, in the order of the batch.
        numbers_BT int64: of each response token its number in slots_N; N for padded slots.

    Raises:
        ValueError: a response without a prompt token before it: nothing of its own would predict its first token.
    """
    responds_BT, positions_BL = batch.response_attention_BT.bool(), inputs["position_ids"]
    if bool((positions_BL.gather(1, places_BT)[responds_BT] == 0).any()):
        raise ValueError("a response without a prompt token before it has nothing to be predicted from")
    rows_B1 = torch.arange(len(places_BT)).unsqueeze(1) * positions_BL.shape[1]
    return (rows_B1 + places_BT)[responds_BT], numbered(responds_BT)


def numbered(responds_BT: Tensor) -> Tensor:
    """Of each True its number in the order of the batch, int64; the number of all of them elsewhere."""
    return torch.where(responds_BT, responds_BT.flatten().cumsum(0).view_as(responds_BT) - 1, int(responds_BT.sum()))


def blank_batch() -> SequenceBatch:
    """One prompt token and one response token that count for nothing: what a rank forwards when it has no rows left."""
    one = torch.ones(1, 1, dtype=torch.bool)
    zero = torch.zeros(1, 1, dtype=torch.long)
    return SequenceBatch(zero, one, zero.clone(), torch.zeros(1, 1, dtype=torch.bool), one.clone())
