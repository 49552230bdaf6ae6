"""Linear layers in 4 bits: NF4 with double quantisation (bitsandbytes; QLoRA, Dettmers et al. 2023, arXiv 2305.14314), frozen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.config.errors import UserError

BLOCK = 64
"""Weights that share a scale. bitsandbytes on a CPU takes only layers whose rows are whole blocks, and fails deep inside otherwise."""
HEADS = ("score", "classifier")
"""Heads of sequence classifiers: read by everything, small, often trained, so they stay as they are."""
LEAST_SHARE = 0.5


def in_4_bits(module: nn.Module) -> bool:
    """Whether this is one of the layers that `quantise` makes."""
    return bool(getattr(module, "in_4_bits", False))


def quantise(model: Any, dtype: torch.dtype, where: str) -> None:
    """Replaces the linear layers by 4-bit ones, in place, all but the head; on a GPU where this process has one.

    Args:
        model: loaded Hugging Face model.
        dtype: the precision in which products are computed.
        where: what an error names: the model's folder.

    Raises:
        UserError: see `check_layers`.
    """
    from rlhf_dist.models.linear4bit import Linear4bit

    check_layers(model, where, on_gpu=torch.cuda.is_available())
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    model.requires_grad_(False)
    for name, linear in list(_linears(model)):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Linear4bit(linear, dtype, device))
    model.is_loaded_in_4bit = True  # peft asks for this


def check_layers(model: Any, where: str, *, on_gpu: bool) -> None:
    """Whether the layers of a model can be held in 4 bits; the model may be on the meta device.

    Raises:
        UserError: on a CPU, a layer whose inputs are no multiple of 64; or most weights are not in linear layers (GPT-2's are not, nor the
            fused experts of some mixtures), so that next to nothing would be gained.
    """
    linears = dict(_linears(model))
    for name, linear in linears.items():
        if not on_gpu and linear.in_features % BLOCK:
            raise UserError(
                f"the layer {name} has {linear.in_features} inputs; bitsandbytes quantises on a CPU only multiples of {BLOCK}",
                where=where,
                fix="set quantize=none, run on a GPU, or choose a model whose layers have a multiple of 64 inputs",
            )
    embeddings = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)]
    rest = sum(p.numel() for p in model.parameters()) - sum(embeddings)
    held = sum(linear.weight.numel() for linear in linears.values())
    if held < LEAST_SHARE * rest:
        raise UserError(
            f"only {held} of {rest} weights are in linear layers that can be quantised",
            where=where,
            fix="set quantize=none: this architecture keeps its weights in other kinds of layers",
        )


def dequantised(layer: nn.Module) -> Tensor:
    """A layer's weight in fp32, also one held in 4 bits. Not for a weight that ZeRO 3 has sharded: gather it before."""
    weights: Any = layer
    return weights.values() if in_4_bits(layer) else weights.weight.detach().float()  # type: ignore[no-any-return]


def _linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not output and name.split(".")[0] not in HEADS:
            yield name, module
