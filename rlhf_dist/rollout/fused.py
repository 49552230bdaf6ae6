"""Llama's forward in few operations, for rollouts on CPU: joined and prepacked products, no module of its own for anything else.

A decode step of few rows spends a third of its time between the products: in small operations and in the calls of modules around them.
Here query, key and value are one product, gate and up another, and positions are turned in place. The numbers are those of the
modules, in the precision of each of their roundings; the probe holds this path to the model's own forward before the first sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from rlhf_dist.rollout.attention import SLOT_ATTENTION, slot_attention
from rlhf_dist.rollout.kv_cache import SlotCache
from rlhf_dist.rollout.prepack import pack, packable, packed_linear
from rlhf_dist.rollout.traits import bare_model

KINDS: tuple[type[nn.Module], ...] = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
"""What computes as the forward below does. A subclass may not."""


@dataclass(frozen=True)
class _Linear:
    weight: Tensor
    bias: Tensor | None

    def __call__(self, inputs: Tensor) -> Tensor:
        return packed_linear(self.weight, self.bias, inputs)


@dataclass(frozen=True)
class _Layer:
    """One decoder layer: its modules, its four products, and the kind of its mask."""

    attention: Any
    act: Any
    norms: tuple[Any, Any]
    qkv: _Linear
    out: _Linear
    gate_up: _Linear
    down: _Linear
    kind: str


def fusable(model: nn.Module) -> bool:
    """Whether `FusedForward` can take the place of this model's own forward. Call inside `traits.decoding`.

    Adapters, hooks and replaced forwards speak against it: they want their modules to be called.
    """
    inner: Any = bare_model(model)
    if type(inner) not in KINDS or inner.config._attn_implementation != SLOT_ATTENTION:
        return False
    core = inner.model
    if 2 * core.rotary_emb.inv_freq.numel() != core.layers[0].self_attn.head_dim:
        return False
    linears = [module for module in core.layers.modules() if isinstance(module, nn.Linear)]
    if len(linears) != 7 * len(core.layers) or not all(map(packable, [*linears, inner.lm_head])):
        return False
    watched = [module for module in model.modules() if module is not core.embed_tokens]
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in watched)


class FusedForward:
    """A forward with its own copy of the weights as they are at its creation.

    Args:
        model: one that is `fusable`.
    """

    def __init__(self, model: nn.Module) -> None:
        inner: Any = bare_model(model)
        self._embed, self._rotary, self._norm = inner.model.embed_tokens, inner.model.rotary_emb, inner.model.norm
        self._head = _joined(inner.lm_head)
        kinds = getattr(inner.config, "layer_types", None) or [""] * len(inner.model.layers)
        self._layers = [_read(layer, kind) for layer, kind in zip(inner.model.layers, kinds, strict=True)]

    def __call__(self, tokens_BQ: Tensor, positions_BQ: Tensor, mask: Any, cache: SlotCache, *, logits: bool) -> Tensor:
        """Logits [B, V] of the last position, or its hidden state [B, H] if nobody wants them. Keys and values go into the cache."""
        hidden_BQH = self._embed(tokens_BQ)
        turn = _turn(*self._rotary(hidden_BQH, position_ids=positions_BQ))
        for number, layer in enumerate(self._layers):
            seen = mask[layer.kind] if isinstance(mask, dict) else mask
            hidden_BQH = hidden_BQH.add_(_attend(layer, number, _normed(layer.norms[0], hidden_BQH), turn, seen, cache))
            hidden_BQH = hidden_BQH.add_(_feed_forward(layer, _normed(layer.norms[1], hidden_BQH)))
        last_BH = hidden_BQH[:, -1]
        return self._head(_normed(self._norm, last_BH)) if logits else last_BH


def _attend(layer: _Layer, number: int, normed_BQH: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, cache: SlotCache) -> Tensor:
    attention = layer.attention
    heads_BQND = layer.qkv(normed_BQH).unflatten(-1, (-1, attention.head_dim))
    queries, keys = attention.config.num_attention_heads, attention.config.num_key_value_heads
    turned = queries + keys
    before_BQND = heads_BQND[:, :, :turned]
    if hasattr(attention, "q_norm"):
        parts = _normed(attention.q_norm, before_BQND[:, :, :queries]), _normed(attention.k_norm, before_BQND[:, :, queries:])
        before_BQND = torch.cat(parts, dim=2)
    cos_BQ1D, sin_BQ1D = turn
    # cat(-second half, first half) * sin, with the sign in the sine.
    after_BQND = (before_BQND * cos_BQ1D).add_(before_BQND.roll(attention.head_dim // 2, -1).mul_(sin_BQ1D))
    query, key = after_BQND[:, :, :queries].transpose(1, 2), after_BQND[:, :, queries:].transpose(1, 2)
    stored = cache.update(key, heads_BQND[:, :, turned:].transpose(1, 2), number)
    attended, _ = slot_attention(attention, query, *stored, mask, dropout=0.0, scaling=attention.scaling)
    return layer.out(attended.flatten(2))


def _feed_forward(layer: _Layer, normed_BQH: Tensor) -> Tensor:
    gate, up = layer.gate_up(normed_BQH).chunk(2, dim=-1)
    return layer.down(layer.act(gate) * up)


def _normed(norm: Any, hidden: Tensor) -> Tensor:
    # The modules round before they multiply by the weight; given the weight, `rms_norm` would round once.
    return F.rms_norm(hidden, norm.weight.shape, None, norm.variance_epsilon).mul_(norm.weight)


def _turn(cos_BQD: Tensor, sin_BQD: Tensor) -> tuple[Tensor, Tensor]:
    half = sin_BQD.shape[-1] // 2
    signed_BQD = torch.cat([-sin_BQD[..., :half], sin_BQD[..., half:]], dim=-1)
    return cos_BQD.unsqueeze(2), signed_BQD.unsqueeze(2)


def _read(layer: Any, kind: str) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        attention,
        mlp.act_fn,
        (layer.input_layernorm, layer.post_attention_layernorm),
        _joined(attention.q_proj, attention.k_proj, attention.v_proj),
        _joined(attention.o_proj),
        _joined(mlp.gate_proj, mlp.up_proj),
        _joined(mlp.down_proj),
        kind,
    )


def _joined(*layers: nn.Linear) -> _Linear:
    """One product in place of several with the same input."""
    weights = [layer.weight.detach() for layer in layers]
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return _Linear(pack(weight), torch.cat(biases) if biases else None)
