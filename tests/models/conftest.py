"""Batches from plain rows, and tiny models of the architectures that differ where it matters here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_dist.contracts.experience import SequenceBatch


@pytest.fixture(scope="session")
def padded() -> Callable[..., SequenceBatch]:
    """`padded(rows, extra, garbage)`: prompts padded left, responses right, `extra` columns more than needed, garbage in the padding."""

    def make(rows: list[tuple[list[int], list[int]]], extra: int = 0, garbage: int = 0) -> SequenceBatch:
        prompt, response = max(len(p) for p, _ in rows) + extra, max(len(r) for _, r in rows) + extra
        lengths = torch.tensor([[len(p), len(r)] for p, r in rows])
        mask_BT = torch.arange(response) < lengths[:, 1:]
        return SequenceBatch(
            torch.tensor([[garbage] * (prompt - len(p)) + p for p, _ in rows]),
            torch.arange(prompt) >= prompt - lengths[:, :1],
            torch.tensor([r + [garbage] * (response - len(r)) for _, r in rows]),
            mask_BT,
            mask_BT.clone(),
        )

    return make


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """`tiny_config(name, **options)`: rotary (llama, qwen2 with biases), absolute positions (gpt2), capped logits and windows (gemma2)."""
    from transformers import Gemma2Config, GPT2Config, LlamaConfig, Qwen2Config

    size = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5}
    grouped = size | {"intermediate_size": 16, "num_key_value_heads": 1, "max_position_embeddings": 12}
    made = {
        "llama": lambda o: LlamaConfig(**(grouped | o)),
        "qwen2": lambda o: Qwen2Config(**(grouped | o)),
        "gpt2": lambda o: GPT2Config(**(size | {"n_positions": 12} | o)),
        "gemma2": lambda o: Gemma2Config(**(grouped | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8} | o)),
    }  # fmt: skip
    return lambda name, **options: made[name](options)
