"""How a rollout runs its model: the Hugging Face forward, with prepacked products on CPU, or the fused one where it knows the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from rlhf_dist.rollout.fused import FusedForward, fusable
from rlhf_dist.rollout.kv_cache import SlotCache
from rlhf_dist.rollout.prepack import prepacked


class Forward(Protocol):
    """A model that stores keys and values in a slot cache, as the cache's plan says."""

    def __call__(self, tokens_BQ: Tensor, positions_BQ: Tensor, mask: Any, cache: SlotCache, *, logits: bool) -> Tensor:
        """Logits [B, V] of the last position; anything if `logits` is False.

        mask: a tensor, one by kind of layer, or None: every token sees those before it in the same forward.
        """
        ...


class PlainForward:
    """The model's own forward."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, tokens_BQ: Tensor, positions_BQ: Tensor, mask: Any, cache: SlotCache, *, logits: bool) -> Tensor:
        """As `Forward` says."""
        output: Any = self._model(
            input_ids=tokens_BQ, position_ids=positions_BQ, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        last_BV: Tensor = output.logits[:, -1]
        return last_BV


@contextmanager
def fastest_forward(model: nn.Module) -> Iterator[Forward]:
    """The fastest way to run a model with its weights as they are on entry. Call inside `traits.decoding`."""
    if fusable(model):
        yield FusedForward(model)
        return
    with prepacked(model):
        yield PlainForward(model)
