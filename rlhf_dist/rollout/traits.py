"""What the decode loop must know about a model: its context, its kinds of attention, and whether it can be decoded at all."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlhf_dist.config.errors import UserError
from rlhf_dist.rollout.attention import SLOT_ATTENTION

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
MASKED_KERNELS = ("eager", "sdpa")
ANOTHER_MODEL = "use a causal LM whose cache holds the keys and values of every position"


@dataclass(frozen=True)
class ModelTraits:
    """Facts read from a model's config.

    context: longest sequence in tokens, None when the model sets no limit. kinds: attention patterns among its layers.
    window: width of the sliding pattern. reach: longest sequence the slot cache decodes correctly, None for any.
    """

    name: str
    context: int | None
    kinds: frozenset[str]
    window: int | None
    reach: int | None

    def check_length(self, prompt: int, new: int, where: str) -> None:
        """Holds a prompt and its completion to the model's context.

        Raises:
            UserError: prompt + new tokens exceed it; both numbers are named.
        """
        for limit, what in ((self.context, "the model's context"), (self.reach, "what the native engine decodes exactly with this model")):
            if limit is not None and prompt + new > limit:
                raise UserError(
                    f"a prompt of {prompt} tokens and {new} new tokens exceed {what} of {limit}",
                    where=where,
                    fix="lower rollout.max_new_tokens or data.max_prompt_tokens",
                )


def read_traits(model: nn.Module) -> ModelTraits:
    """Reads the traits of a Hugging Face causal LM, peft-wrapped or not.

    Raises:
        UserError: no causal LM, or one whose cache is not keys and values by position (state-space and linear attention, alibi).
    """
    inner = bare_model(model)
    config: Any = getattr(inner, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{type(inner).__name__} is not a Hugging Face causal LM", where="policy.model", fix=ANOTHER_MODEL)
    text = config.get_text_config()
    kinds = _kinds(text)
    parameters = inspect.signature(inner.forward).parameters
    by_position = {"position_ids", "past_key_values", "logits_to_keep"} <= set(parameters) and not getattr(text, "alibi", False)
    if not by_position or getattr(inner, "_is_stateful", False) or kinds - {FULL, SLIDING, CHUNKED}:
        raise UserError(
            f"the native rollout engine cannot decode {type(inner).__name__}: its cache is not keys and values at given positions",
            where="policy.model",
            fix=ANOTHER_MODEL,
        )
    window = getattr(text, "sliding_window", None) if SLIDING in kinds else None
    return ModelTraits(type(inner).__name__, getattr(text, "max_position_embeddings", None), kinds, window, _reach(text, kinds))


def bare_model(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a peft wrapper, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    inner: nn.Module = unwrap() if callable(unwrap) else model
    return inner


@contextmanager
def decoding(model: nn.Module) -> Iterator[None]:
    """No gradients, modules in eval mode, an attention kernel that takes our masks; all restored afterwards."""
    training = [module for module in model.modules() if module.training]
    inner: Any = bare_model(model)
    config = inner.config.get_text_config()
    kernel = config._attn_implementation
    try:
        for module in training:
            module.training = False
        if kernel not in MASKED_KERNELS:
            # Flash kernels take no mask. Of those that do, every model has the eager one, and it alone knows a soft cap.
            plain = inner._supports_sdpa and not getattr(config, "attn_logit_softcapping", None)
            config._attn_implementation = "sdpa" if plain else "eager"
        if config._attn_implementation == "sdpa" and _takes_ours(inner):
            config._attn_implementation = SLOT_ATTENTION
        with torch.no_grad():
            yield
    finally:
        config._attn_implementation = kernel
        for module in training:
            module.training = True


def _takes_ours(inner: Any) -> bool:
    """Whether the model looks its kernel up by name, on a device and in a precision that ours is for."""
    return bool(inner._supports_attention_backend and inner.device.type == "cpu" and inner.dtype != torch.float64)


def _kinds(text: Any) -> frozenset[str]:
    """As transformers itself infers them: named layer by layer, or one kind for all."""
    named = getattr(text, "layer_types", None)
    if named:
        return frozenset(named)
    if getattr(text, "sliding_window", None) is not None:
        return frozenset({SLIDING})
    return frozenset({CHUNKED if getattr(text, "attention_chunk_size", None) is not None else FULL})


def _reach(text: Any, kinds: frozenset[str]) -> int | None:
    """Lengths beyond which a pattern needs a mask we do not build, or beyond which rotary frequencies depend on the rest of the batch."""
    limits = []
    if CHUNKED in kinds:
        limits.append(text.attention_chunk_size)
    if "local" in (getattr(text, "attention_layers", None) or ()):
        limits.append(text.window_size)
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") == "longrope":
            limits.append(parameters.get("original_max_position_embeddings") or text.original_max_position_embeddings)
    return min(limits) if limits else None
