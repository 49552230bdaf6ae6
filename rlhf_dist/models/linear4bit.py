"""A linear layer of bitsandbytes in 4 bits. Its library takes half a second to import, so this is imported where such a layer is made."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn


class Linear4bit(bitsandbytes.nn.Linear4bit):
    """Frozen NF4 weights, whose values do not depend on what was computed before.

    bitsandbytes' own repacks its weights on a CPU with AVX512-BF16 during the first forward without gradient: from then on products are
    rounded to bf16, no gradient passes, and a reader of the weights sees another layout. And its state dict holds the scales beside the
    weights; ours holds the packed weights alone, because frozen weights come from the base model's folder and from nowhere else.
    """

    in_4_bits = True

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, device: str) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, dtype, quant_type="nf4", device="meta")
        self.support_avx512bf16_for_cpu = False
        kept: Any = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=self)
        self.weight = kept.to(device)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.data.to(device), requires_grad=False)

    def values(self) -> Tensor:
        """The weight in fp32."""
        weight: Any = self.weight
        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32  # else rounded to the precision that the model was loaded in, before the adapter is added
        return bitsandbytes.functional.dequantize_4bit(weight.data, state)  # type: ignore[no-any-return]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
