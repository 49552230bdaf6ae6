"""Trains a tiny causal language model from scratch, so that the quickstart needs no download."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from rlhf_dist.algos.likelihood import nll_objective
from rlhf_dist.config.deepspeed import resolve_deepspeed
from rlhf_dist.config.optim import OptimSection
from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.engines.deepspeed import DeepSpeedEngine, Training
from rlhf_dist.engines.process import Rank
from rlhf_dist.models.policy import PolicyModule


@dataclass(frozen=True)
class TinyModel:
    """Shape of the model and length of its training."""

    hidden_size: int = 96
    layers: int = 3
    heads: int = 4
    context: int = 128
    steps: int = 600
    batch_size: int = 64
    lr: float = 5e-3


Progress = Callable[[int, int, float], None]
"""Told step, steps and loss (nats a token)."""


def train_language_model(
    sequences: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, shape: TinyModel, seed: int, progress: Progress, rank: Rank
) -> tuple[LlamaForCausalLM, float]:
    """Trains on whole sequences (start token first, end token last); returns the model and the mean loss of the last tenth of the steps.

    Raises:
        ValueError: fewer sequences than one batch holds, or a sequence that exceeds the context.
    """
    _check(sequences, shape)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_llama(tokenizer, shape))
    optim = OptimSection(lr=shape.lr, warmup_steps=shape.steps // 20, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    config = resolve_deepspeed("", dtype="fp32", clip_norm=optim.clip_norm, trains=True)
    engine = DeepSpeedEngine(PolicyModule(model), config, rank, Training(optim, shape.steps))
    draw, losses = random.Random(seed), []
    for step in range(shape.steps):
        batch = pack_sequences([sequences[i] for i in draw.sample(range(len(sequences)), shape.batch_size)])
        losses.append(engine.forward_backward([batch], nll_objective, float(batch.response_mask_BT.sum())).means()["loss"])
        engine.optimizer_step()
        progress(step + 1, shape.steps, losses[-1])
    last = losses[-max(1, len(losses) // 10) :]
    return model, sum(last) / len(last)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a Hugging Face folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pack_sequences(sequences: Sequence[Sequence[int]]) -> SequenceBatch:
    """The first token of each sequence is its prompt, the rest its response: every token but the first is predicted."""
    width = max(len(sequence) for sequence in sequences) - 1
    lengths_B = torch.tensor([len(sequence) - 1 for sequence in sequences])
    mask_BT = torch.arange(width) < lengths_B.unsqueeze(1)
    response_tokens_BT = torch.tensor([[*sequence[1:], *[0] * (width + 1 - len(sequence))] for sequence in sequences])
    prompt_tokens_BP = torch.tensor([[sequence[0]] for sequence in sequences])
    return SequenceBatch(
        prompt_tokens_BP, torch.ones_like(prompt_tokens_BP, dtype=torch.bool), response_tokens_BT, mask_BT, mask_BT.clone()
    )


def _llama(tokenizer: PreTrainedTokenizerBase, shape: TinyModel) -> LlamaConfig:
    return LlamaConfig(
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


def _check(sequences: Sequence[Sequence[int]], shape: TinyModel) -> None:
    if len(sequences) < shape.batch_size:
        raise ValueError(f"{len(sequences)} sequences, but a batch takes {shape.batch_size}")
    longest = max(len(sequence) for sequence in sequences)
    if longest > shape.context:
        raise ValueError(f"a sequence of {longest} tokens exceeds the context of {shape.context}")
