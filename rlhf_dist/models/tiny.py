"""A tiny causal language model with random weights, so that the quickstart needs no download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TinyShape:
    """Sizes of the model; context in tokens."""

    hidden_size: int = 96
    layers: int = 3
    heads: int = 4
    context: int = 128


def save_untrained(tokenizer: PreTrainedTokenizerBase, shape: TinyShape, seed: int, folder: Path) -> int:
    """Writes a Hugging Face folder of a Llama with random weights, tokenizer included; returns its number of parameters.

    The same seed gives the same weights; the global random state is left as it was.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=2 * shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())
