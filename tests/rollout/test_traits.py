"""Which models are accepted, how long a sequence may be, and what `decoding` changes and gives back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from rlhf_dist.config.errors import UserError
from rlhf_dist.rollout.attention import SLOT_ATTENTION
from rlhf_dist.rollout.traits import decoding, read_traits

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "context", "window"),
    [
        (hf.LlamaConfig(**SMALL), 64, None),
        (hf.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8), 64, 8),
        (hf.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=16), 64, 16),
        (hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=48, bos_token_id=1, eos_token_id=2), 48, None),
    ],
)
def test_context_and_window(build: Callable[..., Any], config: Any, context: int, window: int | None) -> None:
    traits = read_traits(build(config))
    assert (traits.context, traits.window, traits.reach) == (context, window, None)


@pytest.mark.parametrize(
    "config",
    [
        hf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, bos_token_id=1, eos_token_id=2, pad_token_id=0),
        hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
        hf.FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
    ],
)
def test_models_without_keys_and_values_by_position_are_refused(config: Any) -> None:
    with pytest.raises(UserError, match="cannot decode"):
        read_traits(hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def test_an_encoder_decoder_and_a_plain_module_are_refused() -> None:
    t5 = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=97, d_model=16, d_ff=16, d_kv=4, num_layers=1, num_heads=2))
    for model in (t5, torch.nn.Linear(2, 2)):
        with pytest.raises(UserError, match="not a Hugging Face causal LM"):
            read_traits(model)


def test_too_long_names_both_numbers(llama: Any) -> None:
    traits = read_traits(llama)
    traits.check_length(40, 24, "row 3")
    with pytest.raises(UserError, match=r"41 tokens and 24 new.*context of 64") as caught:
        traits.check_length(41, 24, "row 3")
    assert caught.value.where == "row 3"


def test_local_attention_and_longrope_are_held_to_the_length_that_is_exact(build: Callable[..., Any]) -> None:
    neo = hf.GPTNeoConfig(
        vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    phi = hf.Phi3Config(**SMALL, num_key_value_heads=4, original_max_position_embeddings=32, rope_parameters=rope)
    for config, attention, reach in ((neo, "eager", 8), (phi, "sdpa", 32)):
        traits = read_traits(build(config, attention))
        assert traits.reach == reach
        traits.check_length(3, reach - 3, "")
        with pytest.raises(UserError, match=f"decodes exactly with this model of {reach}"):
            traits.check_length(3, reach - 2, "")


def test_peft_models_are_read_through(build: Callable[..., Any], llama: Any) -> None:
    wrapped = get_peft_model(build(llama.config), LoraConfig(r=2, target_modules=["q_proj"]))
    assert read_traits(wrapped) == read_traits(llama)


def test_decoding_gives_back_modes_gradients_and_kernel(build: Callable[..., Any], llama: Any) -> None:
    model = build(llama.config)
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    model.config._attn_implementation = "flash_attention_2"
    with decoding(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled() and model.config._attn_implementation == SLOT_ATTENTION
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled() and model.config._attn_implementation == "flash_attention_2"


def test_a_soft_cap_keeps_the_kernel_that_knows_it(build: Callable[..., Any]) -> None:
    model = build(hf.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=50.0))
    model.config._attn_implementation = "flash_attention_2"
    with decoding(model):
        assert model.config._attn_implementation == "eager"


def test_models_that_choose_their_kernel_themselves_keep_it(build: Callable[..., Any]) -> None:
    config = hf.FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64)
    model = build(config)
    with decoding(model):
        assert model.config._attn_implementation == "sdpa"
    double = build(hf.LlamaConfig(**SMALL)).double()
    with decoding(double):
        assert double.config._attn_implementation == "sdpa"
