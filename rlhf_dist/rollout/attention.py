"""The attention of a decode step on CPUs: one query a row against keys that lie transposed in the slot cache.

PyTorch's flash kernel is made for many queries: for a single one it spends most of its time laying keys out anew, in bf16 still more
than in fp32. Here a step is two batched products over plain views of the cache, with fp32 scores and an fp32 softmax as in that kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SLOT_ATTENTION = "rlhf_dist_slots"
"""Name of the kernel in a model's config. Masks of decode steps are float32 and are added to the scores."""


def slot_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it: query [n, heads, q, d], key and value [n, kv_heads, span, d]; returns [n, q, heads, d].

    Forwards of more than one position, and those whose mask is not to be added, go to PyTorch's own kernel.
    """
    if query.shape[2] > 1 or attention_mask is None or attention_mask.dtype != torch.float32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling, bias = kwargs.get("scaling"), kwargs.get("position_bias")
    (rows, heads, _, width), groups = query.shape, key.shape[1]
    added = spread_mask(attention_mask if bias is None else attention_mask + bias, rows, heads, groups)
    # Heads that share their keys are rows of one product.
    queries = query.to(key.dtype).reshape(rows * groups, heads // groups, width)
    attended = attend_once(queries, key, value, added, width**-0.5 if scaling is None else scaling)
    return attended.to(query.dtype).view(rows, 1, heads, value.shape[3]), None


def spread_mask(mask: Tensor, rows: int, heads: int, groups: int) -> Tensor:
    """What is added to the scores of `attend_once`, [rows · groups, heads / groups, span], from a mask [1 or rows, 1 or heads, 1, span]."""
    return mask.expand(rows, heads, -1, -1).reshape(rows * groups, heads // groups, mask.shape[-1])


def attend_once(queries: Tensor, key: Tensor, value: Tensor, added: Tensor, scaling: float) -> Tensor:
    """Attention of one position a row: queries [n · kv_heads, heads / kv_heads, d], key and value [n, kv_heads, span, d]; as queries."""
    scores = torch.baddbmm(added, queries, key.transpose(2, 3).flatten(0, 1), alpha=scaling)
    return torch.bmm(torch.softmax(scores, dim=-1), value.flatten(0, 1))


AttentionInterface.register(SLOT_ATTENTION, slot_attention)
AttentionMaskInterface.register(SLOT_ATTENTION, sdpa_mask)
