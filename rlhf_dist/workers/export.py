"""Hugging Face folders out of sharded engines: safetensors, config, tokenizer; loadable with no help from us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_dist.config.errors import writing
from rlhf_dist.contracts.engine import Engine
from rlhf_dist.models.saving import save_model, write_adapter

ADAPTER = "adapter"
"""Subfolder of an export that holds the trained adapter alone."""


def export_model(engine: Engine, model: Any, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Writes the engine's model, adapters merged; with LoRA also the adapter alone, as a PEFT folder in `adapter/`.

    Collective: every rank walks through the weights, rank 0 keeps and writes them.

    Args:
        engine: where the weights are.
        model: the Hugging Face model whose class and config describe them, or a peft wrapper around it.
        tokenizer: saved beside the weights.
        folder: made if needed.

    Raises:
        UserError: the disk is full, or may not be written to.
    """
    adapted = hasattr(model, "peft_config")
    weights = collected(engine, merged=True)
    trained = collected(engine, merged=False) if adapted else {}
    if engine.rank != 0:
        return
    with writing(folder):
        save_model(model.get_base_model() if adapted else model, weights, Path(folder))
        tokenizer.save_pretrained(folder)
        if adapted:
            write_adapter(model, trained, Path(folder) / ADAPTER)
            tokenizer.save_pretrained(str(Path(folder) / ADAPTER))


def collected(engine: Engine, *, merged: bool) -> dict[str, Tensor]:
    """All weights of an engine on rank 0 (`Engine.export_weights`), nothing on the others. Collective."""
    weights: dict[str, Tensor] = {}
    for bucket in engine.export_weights(merged):
        if engine.rank == 0:
            weights |= {name: weight.cpu().contiguous() for name, weight in bucket.items()}
    return weights
