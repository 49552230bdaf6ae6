"""Rows for a pad token: zeros beside weights that stay, and a configuration that knows the token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, Gemma3Config, LlamaConfig

from rlhf_dist.models.padding import embedding_rows, grow_embeddings, name_pad, with_rows


@pytest.fixture
def model(tiny_config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1, pad_token_id=2))


@pytest.mark.parametrize("wanted", [41, 43, 40, 7])
def test_embeddings_grow_by_zeros_and_never_shrink(model: Any, wanted: int) -> None:
    before = model.get_input_embeddings().weight.detach().clone()
    grow_embeddings(model, wanted)
    weight = model.get_input_embeddings().weight
    assert embedding_rows(model) == len(weight) == max(wanted, 40) == model.config.vocab_size
    assert torch.equal(weight[:40], before) and not weight[40:].any()


def test_rows_of_adapted_embeddings_are_counted(model: Any) -> None:
    assert embedding_rows(get_peft_model(model, LoraConfig(target_modules=["embed_tokens"]))) == 40


def test_a_new_pad_is_a_token_that_the_configuration_counts() -> None:
    for config, text in ((plain := LlamaConfig(vocab_size=9, pad_token_id=2), plain), (nested := Gemma3Config(), nested.text_config)):
        rows = text.vocab_size
        name_pad(config, 4)
        assert (config.pad_token_id, text.pad_token_id, text.vocab_size) == (4, 4, rows)
        name_pad(config, rows)
        assert (config.pad_token_id, text.pad_token_id, text.vocab_size) == (rows, rows, rows + 1)


@pytest.mark.parametrize("dim", [0, 1])
def test_tensors_are_filled_up_with_zeros(dim: int) -> None:
    given = torch.ones(2, 2)
    grown = with_rows(given, 5, dim)
    assert grown.sum(dim).tolist() == [2.0, 2.0] and grown.shape[dim] == 5 and torch.equal(grown[:2, :2], given)
    assert with_rows(given, 2, dim) is given and with_rows(given, 1, dim) is given
