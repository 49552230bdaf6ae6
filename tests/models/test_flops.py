"""Costs read off real modules against what PyTorch counts while they run."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, MixtralConfig

from rlhf_dist.config.engines import LoraSection
from rlhf_dist.contracts.preferences import PreferenceBatch
from rlhf_dist.models.classifier import EncodedTexts
from rlhf_dist.models.flops import flops_of, forward_flops, training_flops
from rlhf_dist.models.lora import add_adapter

ROWS = [([5, 6], [7, 2]), ([8], [9, 10, 11, 12, 13]), ([14, 15, 16, 17, 18], [2])]


def holding(model: Any) -> Any:
    return SimpleNamespace(model=model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gemma2"])
def test_a_forward_costs_what_is_counted_while_it_runs(name: str, tied: bool, tiny_config: Callable[..., Any]) -> None:
    """To the biases and norms, which the counter leaves out (4 % of so small a model); it sees attention unmasked."""
    tokens = 12
    model = AutoModelForCausalLM.from_config(
        tiny_config(name, hidden_size=64, tie_word_embeddings=tied, attn_implementation="eager")
    ).eval()
    costs = forward_flops(holding(model))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(tokens)[None], use_cache=False)
    assert costs.linear * tokens + 2 * costs.attention * tokens**2 + costs.head * tokens == pytest.approx(
        counter.get_total_flops(), rel=0.05
    )
    assert costs.attention > 0 and costs.head == 2 * 64 * 40


def test_a_classifier_has_no_vocabulary_to_predict(tiny_config: Callable[..., Any]) -> None:
    config = tiny_config("llama", num_labels=1)
    scorer, policy = AutoModelForSequenceClassification.from_config(config), AutoModelForCausalLM.from_config(config)
    mine, theirs = forward_flops(holding(scorer)), forward_flops(holding(policy))
    assert mine.head == 0 and mine.linear == theirs.linear + 2 * 16 and mine.attention == theirs.attention


def test_a_token_goes_through_some_of_the_experts() -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    few, many = (
        forward_flops(holding(AutoModelForCausalLM.from_config(MixtralConfig(**sizes, num_local_experts=count)))) for count in (2, 8)
    )
    routers = 2 * 2 * 16 * (8 - 2)
    assert many.linear == few.linear + routers


def test_training_costs_are_those_of_what_is_trained(tiny_config: Callable[..., Any]) -> None:
    model: Any = AutoModelForCausalLM.from_config(tiny_config("llama"))
    once = forward_flops(holding(model))
    assert training_flops(holding(model)).linear == 3 * once.linear
    model.gradient_checkpointing_enable()
    assert training_flops(holding(model)).linear == 4 * once.linear
    model.gradient_checkpointing_disable()
    adapted = add_adapter(model, LoraSection(r=2), seed=0)
    base, again = forward_flops(holding(adapted)), training_flops(holding(adapted))
    assert base.linear > once.linear and again.linear == 2 * base.linear and again.attention == 3 * base.attention


def test_batches_count_their_tokens_and_no_padding(tiny_config: Callable[..., Any], padded: Callable[..., Any]) -> None:
    costs = forward_flops(holding(AutoModelForCausalLM.from_config(tiny_config("llama"))))
    want = costs.forward(4, 2) + costs.forward(6, 5) + costs.forward(6, 1)
    assert flops_of(costs, [padded(ROWS, extra=3)]) == flops_of(costs, [padded(ROWS[:2]), padded(ROWS[2:])]) == pytest.approx(want)
    texts = EncodedTexts.from_rows([[1, 2, 3], [4]])
    pairs = PreferenceBatch(texts.tokens_BL, texts.mask_BL, *(torch.zeros(0) for _ in range(5)))
    assert flops_of(costs, [texts]) == flops_of(costs, [pairs]) == costs.forward(3) + costs.forward(1)
