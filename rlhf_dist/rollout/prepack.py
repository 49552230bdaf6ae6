"""Linear layers with their weights laid out for oneDNN, for the duration of a rollout on CPU.

The plain path lays a weight out again at every call, which for the few rows of a decode step costs more than the product itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LAYOUT_ROWS = 64
"""Rows of input the layout is made for. One constant: results must not depend on how many rows happen to be decoded together."""


def prepack_available() -> bool:
    """Whether this build of torch has the operators."""
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@contextmanager
def prepacked(model: nn.Module) -> Iterator[None]:
    """Inside, every plain `nn.Linear` on CPU computes with a repacked copy of its weight; afterwards all is as before.

    The copies are made on entry, so they hold the weights as they are now, and take as much memory as the weights they copy.

    Args:
        model: any module; layers of other types, devices or dtypes are left alone.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and packable(layer)]
    try:
        for layer in layers:
            layer.__dict__["forward"] = functools.partial(packed_linear, pack(layer.weight.detach()), layer.bias)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def packable(layer: nn.Linear) -> bool:
    """Whether a layer's weight can be laid out anew, and no one has given the layer a forward of its own."""
    # A subclass may compute something else, and a forward set on the layer itself belongs to somebody.
    if not prepack_available() or type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    return layer.weight.device.type == "cpu" and layer.weight.dtype in _dtypes() and layer.weight.numel() > 0


def pack(weight: Tensor) -> Tensor:
    """A copy of a weight [out, in] for `packed_linear`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, LAYOUT_ROWS)
    return packed


def packed_linear(packed: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    """`inputs` [..., in] times a weight that `pack` laid out, plus the bias [out]."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
    return result


def _dtypes() -> tuple[torch.dtype, ...]:
    """bfloat16 needs instructions that not every CPU has."""
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)
