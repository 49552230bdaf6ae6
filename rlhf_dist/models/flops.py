"""What a model costs, read off its weights and its configuration, and the operations of what went through it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.contracts.flops import FlopModel


def forward_flops(module: nn.Module) -> FlopModel:
    """Of a forward of a role's module, whose `model` is a Hugging Face (or peft) one, also where ZeRO 3 or 4 bits hold it otherwise.

    Layers are all parameters but embeddings and the language model's head; of experts as many count as a token goes through.
    """
    model: Any = module.model
    config = model.config.get_text_config()
    heads, depth = (number_of(config, name) for name in ("num_attention_heads", "num_hidden_layers"))
    width = number_of(config, "head_dim") or (number_of(config, "hidden_size") // heads if heads else 0)
    head = getattr(model.get_output_embeddings(), "weight", None)
    left_out = {id(table.weight) for table in model.modules() if isinstance(table, nn.Embedding)} | {id(head)}
    share = _active_experts(config)
    layers = sum(whole_size(p) * (share if ".experts." in name else 1.0) for name, p in model.named_parameters() if id(p) not in left_out)
    return FlopModel(2 * layers, 2.0 * depth * heads * width, 0.0 if head is None else 2.0 * whole_size(head))


def training_flops(module: nn.Module) -> FlopModel:
    """Of a forward and backward pass of a role's module, as it is trained."""
    model: Any = module.model
    frozen = not all(parameter.requires_grad for parameter in model.parameters())
    return forward_flops(module).training(frozen=frozen, recomputed=bool(getattr(model, "is_gradient_checkpointing", False)))


def flops_of(costs: FlopModel, batches: Iterable[Any]) -> float:
    """Operations of batches, padding not counted: of prompts and responses, or of texts whose `mask_BL` or `mask_NL` says what exists."""
    total = 0.0
    for batch in batches:
        if isinstance(batch, SequenceBatch):
            predicted = batch.response_lengths_B
            tokens, wanted = (batch.prompt_lengths_B + predicted).tolist(), predicted.tolist()
        else:
            mask: Tensor = batch.mask_NL if hasattr(batch, "mask_NL") else batch.mask_BL
            tokens = mask.sum(1).tolist()
            wanted = [0] * len(tokens)
        total += sum(costs.forward(length, count) for length, count in zip(tokens, wanted, strict=True))
    return total


def whole_size(parameter: Any) -> int:
    """Numbers in a parameter, also where ZeRO 3 left a shard of it here or it is held in 4 bits."""
    packed = getattr(parameter, "quant_state", None)
    return int(packed.shape.numel() if packed is not None else getattr(parameter, "ds_numel", parameter.numel()))


def number_of(config: Any, name: str) -> int:
    """A setting that is one number, 0 where a model has none or another in every layer: then its attention counts for what is known."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers' answer where layers differ
        return 0
    return value if isinstance(value, int) else 0


def _active_experts(config: Any) -> float:
    chosen = getattr(config, "num_experts_per_tok", None)
    every = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or getattr(config, "n_routed_experts", None)
    return chosen / every if chosen and every else 1.0
