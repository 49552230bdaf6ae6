"""Hugging Face folders out of sharded engines: safetensors, config, tokenizer; loadable with no help from us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

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
    Path(folder).mkdir(parents=True, exist_ok=True)
    _save(model.get_base_model() if hasattr(model, "get_base_model") else model, weights, Path(folder))
    tokenizer.save_pretrained(folder)


def _save(model: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Writes the model with its key/value cache on again, and its generation settings as they came.

    Published models name a temperature without do_sample; transformers reads that, and refuses to write it.
    """
    generation, cache = getattr(model, "generation_config", None), model.config.use_cache
    model.generation_config, model.config.use_cache = GenerationConfig(), True
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        model.generation_config, model.config.use_cache = generation, cache
    if generation is not None and model.can_generate():
        generation.to_json_file(folder / "generation_config.json")
