"""Hugging Face folders out of sharded engines: safetensors, config, tokenizer; loadable with no help from us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_dist.contracts.engine import Engine


def export_model(engine: Engine, model: Any, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Writes the engine's model. Collective: every rank walks through the weights, rank 0 keeps and writes them.

    Args:
        engine: where the weights are.
        model: the Hugging Face model whose class and config describe them (a peft wrapper is taken off, adapters are merged).
        tokenizer: saved beside the weights.
        folder: made if needed.
    """
    weights: dict[str, Tensor] = {}
    for bucket in engine.export_weights():
        if engine.rank == 0:
            weights |= {name: weight.cpu().contiguous() for name, weight in bucket.items()}
    if engine.rank != 0:
        return
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    Path(folder).mkdir(parents=True, exist_ok=True)
    used, plain.config.use_cache = plain.config.use_cache, True
    plain.save_pretrained(folder, state_dict=weights)
    plain.config.use_cache = used
    tokenizer.save_pretrained(folder)
