"""The untrained model: a complete folder, the same for the same seed, and nobody's random numbers disturbed."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.models.loading import load_tokenizer, stop_tokens
from rlhf_dist.models.tiny import TinyShape, save_untrained

SHAPE = TinyShape(hidden_size=32, layers=1, heads=2, context=16)


def test_a_folder_that_transformers_loads(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    before = torch.random.get_rng_state()
    count = save_untrained(tokenizer, SHAPE, 3, tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), before)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.num_parameters() == count and model.config.max_position_embeddings == 16
    assert len(AutoTokenizer.from_pretrained(tmp_path / "a")) == model.config.vocab_size == len(tokenizer)
    assert stop_tokens(str(tmp_path / "a"), tokenizer) == (tokenizer.eos_token_id,)
    with torch.no_grad():
        loss = model(torch.tensor([[1, 5, 6, 7]]), labels=torch.tensor([[1, 5, 6, 7]])).loss
    assert abs(loss - math.log(len(tokenizer))) < 0.2, "it knows nothing yet"


def test_the_seed_decides(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_untrained(tokenizer, SHAPE, seed, tmp_path / name)
        weights.append(dict(AutoModelForCausalLM.from_pretrained(tmp_path / name).named_parameters()))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
