"""Which forward a rollout takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

from rlhf_dist.rollout import prepack
from rlhf_dist.rollout.decoder import SlotDecoder
from rlhf_dist.rollout.forward import PlainForward, fastest_forward
from rlhf_dist.rollout.fused import FusedForward
from rlhf_dist.rollout.prepack import prepack_available
from rlhf_dist.rollout.traits import decoding, read_traits

GPT2 = hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=54, bos_token_id=1, eos_token_id=2)


@pytest.mark.skipif(not prepack_available(), reason="this torch has no oneDNN linear operators")
def test_a_llama_on_cpu_is_fused_and_others_run_with_packed_products(build: Callable[..., Any], llama: Any) -> None:
    with decoding(llama), fastest_forward(llama) as forward:
        assert isinstance(forward, FusedForward)
    phi = build(hf.PhiConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4))
    with decoding(phi), fastest_forward(phi) as forward:
        assert isinstance(forward, PlainForward) and "forward" in phi.lm_head.__dict__
    assert "forward" not in phi.lm_head.__dict__


def test_without_the_operators_a_llama_runs_as_it_is(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepack, "prepack_available", lambda: False)
    with decoding(llama), fastest_forward(llama) as forward:
        assert isinstance(forward, PlainForward) and "forward" not in llama.lm_head.__dict__


@pytest.mark.parametrize("model_of", ["llama", "gpt2"])
def test_the_plain_forward_is_the_default_and_equals_the_model(build: Callable[..., Any], llama: Any, model_of: str) -> None:
    model = llama if model_of == "llama" else build(GPT2)
    prompt = (5, 6, 7, 8)
    with decoding(model):
        decoder = SlotDecoder(model, read_traits(model), slots=1, max_len=8)
        decoder.admit([prompt], [0])
        logits = decoder.step()
        expected = model(torch.tensor([prompt]), use_cache=False).logits[0, -1]
    assert torch.allclose(logits[0], expected, atol=1e-5)
