"""The tiny language model learns, deterministically, and what it cannot train on is refused."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.models.loading import load_tokenizer
from rlhf_dist.training.language_model import TinyModel, pack_sequences, save_model, train_language_model

SHAPE = TinyModel(hidden_size=32, layers=1, heads=2, context=16, steps=60, batch_size=16, lr=1e-2)


def sequences(count: int = 64) -> list[list[int]]:
    """`<s> a a a ... </s>`: after the first word everything is certain."""
    draw = random.Random(0)
    return [[1, *[draw.randrange(4, 12)] * draw.randrange(2, 6), 2] for _ in range(count)]


def train(tokenizer: Any, rank: Any, steps: list[int] | None = None) -> tuple[Any, float]:
    told = steps if steps is not None else []
    return train_language_model(sequences(), tokenizer, SHAPE, 0, lambda step, total, loss: told.append(step), rank)


def test_it_learns_and_is_deterministic(tiny_model: Path, plain_rank: Any, tmp_path: Path) -> None:
    tokenizer, told = load_tokenizer(str(tiny_model)), list[int]()
    model, loss = train(tokenizer, plain_rank, told)
    assert told == list(range(1, SHAPE.steps + 1))
    uniform = math.log(len(tokenizer))
    assert loss < 0.4 * uniform, "repeated words are easy"
    again, same = train(tokenizer, plain_rank)
    assert same == loss
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    save_model(model, tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = torch.tensor([sequences(1)[0]])
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, model(tokens).logits, atol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id == 2 == loaded.config.eos_token_id


def test_every_token_but_the_first_is_predicted() -> None:
    batch = pack_sequences([[1, 5, 6, 2], [1, 7, 2]])
    assert batch.prompt_tokens_BP.tolist() == [[1], [1]] and batch.response_tokens_BT.tolist() == [[5, 6, 2], [7, 2, 0]]
    assert batch.response_mask_BT.tolist() == [[True] * 3, [True, True, False]]


def test_too_few_or_too_long_sequences_are_refused(tiny_model: Path, plain_rank: Any) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    with pytest.raises(ValueError, match="a batch takes 16"):
        train_language_model(sequences(3), tokenizer, SHAPE, 0, lambda *_: None, plain_rank)
    with pytest.raises(ValueError, match="17 tokens exceeds the context of 16"):
        train_language_model([*sequences(), [1] * 17], tokenizer, SHAPE, 0, lambda *_: None, plain_rank)
