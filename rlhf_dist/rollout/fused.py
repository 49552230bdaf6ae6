"""Llama's forward in few operations, for rollouts on CPU: joined and prepacked products, no module of its own for anything else.

A decode step of few rows spends a third of its time between the products: in small operations and in the calls of modules around them.
Here query, key and value are one product, gate and up another, and positions are turned in place. The numbers are those of the
modules, in the precision of each of their roundings; the probe holds this path to the model's own forward before the first sample.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from rlhf_dist.rollout.attention import SLOT_ATTENTION, attend_once, slot_attention, spread_mask
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


class _Norm:
    """Root mean square, in the modules' roundings: they round before they multiply by the weight, where `rms_norm` would round once."""

    def __init__(self, module: Any) -> None:
        self._weight, self._epsilon = module.weight, torch.tensor(module.variance_epsilon)

    def __call__(self, hidden: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._epsilon, size, size, value=1 / hidden.shape[-1]).rsqrt_()
        return torch.mul(hidden, scale, out=torch.empty_like(hidden)).mul_(self._weight)


@dataclass(frozen=True)
class _Layer:
    """One decoder layer: its modules, its norms, its four products, and the kind of its mask."""

    attention: Any
    act: Any
    norms: tuple[_Norm, _Norm]
    head_norms: tuple[_Norm, _Norm] | None
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
        self._embed, self._rotary, self._norm = inner.model.embed_tokens, inner.model.rotary_emb, _Norm(inner.model.norm)
        self._head = _joined(inner.lm_head)
        self._heads = inner.config.num_attention_heads, inner.config.num_key_value_heads
        kinds = getattr(inner.config, "layer_types", None) or [""] * len(inner.model.layers)
        self._layers = [_read(layer, kind) for layer, kind in zip(inner.model.layers, kinds, strict=True)]

    def __call__(self, tokens_BQ: Tensor, positions_BQ: Tensor, mask: Any, cache: SlotCache, *, logits: bool) -> Tensor:
        """Logits [B, V] of the last position; anything if nobody wants them. Keys and values go into the cache."""
        hidden_BQH = self._embed(tokens_BQ)
        turn = _turn(*self._rotary(hidden_BQH, position_ids=positions_BQ))
        if tokens_BQ.shape[1] == 1:  # a decode step: spread once for all layers
            spread = functools.partial(spread_mask, rows=len(tokens_BQ), heads=self._heads[0], groups=self._heads[1])
            mask = {kind: spread(seen) for kind, seen in mask.items()} if isinstance(mask, dict) else spread(mask)
        for number, layer in enumerate(self._layers):
            query_BQND, key, value = self._project(layer, number, layer.norms[0](hidden_BQH), turn, cache)
            if not logits and layer is self._layers[-1]:  # keys and values were all that was wanted
                break
            seen = mask[layer.kind] if isinstance(mask, dict) else mask
            hidden_BQH = hidden_BQH.add_(layer.out(self._attend(layer.attention, query_BQND, key, value, seen)))
            gate, up = layer.gate_up(layer.norms[1](hidden_BQH)).chunk(2, dim=-1)
            hidden_BQH = hidden_BQH.add_(layer.down(layer.act(gate) * up))
        return self._head(self._norm(hidden_BQH[:, -1])) if logits else hidden_BQH

    def _project(
        self, layer: _Layer, number: int, normed_BQH: Tensor, turn: tuple[Tensor, Tensor], cache: SlotCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, Q, heads, d] at their positions, and the keys and values that they may attend over."""
        width, (queries, keys) = layer.attention.head_dim, self._heads
        heads_BQND, turned = layer.qkv(normed_BQH).unflatten(-1, (-1, width)), queries + keys
        before_BQND = heads_BQND[:, :, :turned]
        if layer.head_norms is not None:
            parts = layer.head_norms[0](before_BQND[:, :, :queries]), layer.head_norms[1](before_BQND[:, :, queries:])
            before_BQND = torch.cat(parts, dim=2)
        cos_BQ1D, sin_BQ1D = turn
        # cat(-second half, first half) * sin, with the sign in the sine.
        after_BQND = (before_BQND * cos_BQ1D).add_(before_BQND.roll(width // 2, -1).mul_(sin_BQ1D))
        key, value = cache.update(after_BQND[:, :, queries:].transpose(1, 2), heads_BQND[:, :, turned:].transpose(1, 2), number)
        return after_BQND[:, :, :queries], key, value

    def _attend(self, attention: Any, query_BQND: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        """The heads side by side, [B, Q, heads · d]."""
        rows, positions, heads, width = query_BQND.shape
        if positions > 1:
            attended, _ = slot_attention(attention, query_BQND.transpose(1, 2), key, value, mask, dropout=0.0, scaling=attention.scaling)
            return attended.flatten(2)
        queries = query_BQND.to(key.dtype).reshape(mask.shape[0], mask.shape[1], width)
        return attend_once(queries, key, value, mask, attention.scaling).to(query_BQND.dtype).view(rows, 1, heads * width)


def _turn(cos_BQD: Tensor, sin_BQD: Tensor) -> tuple[Tensor, Tensor]:
    half = sin_BQD.shape[-1] // 2
    signed_BQD = torch.cat([-sin_BQD[..., :half], sin_BQD[..., half:]], dim=-1)
    return cos_BQD.unsqueeze(2), signed_BQD.unsqueeze(2)


def _read(layer: Any, kind: str) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        attention,
        mlp.act_fn,
        (_Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)),
        (_Norm(attention.q_norm), _Norm(attention.k_norm)) if hasattr(attention, "q_norm") else None,
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
