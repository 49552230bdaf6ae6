"""The fused forward: the same numbers as the modules, and only for models that compute what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import nn

from rlhf_dist.rollout import prefill
from rlhf_dist.rollout.decoder import SlotDecoder
from rlhf_dist.rollout.forward import PlainForward
from rlhf_dist.rollout.fused import FusedForward, fusable
from rlhf_dist.rollout.prepack import prepack_available, prepacked
from rlhf_dist.rollout.probe import decoding_gap
from rlhf_dist.rollout.traits import decoding, read_traits

pytestmark = pytest.mark.skipif(not prepack_available(), reason="this torch has no oneDNN linear operators")

BASE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KNOWN = {
    "llama": hf.LlamaConfig(**BASE),
    "llama_biases": hf.LlamaConfig(**BASE, attention_bias=True, mlp_bias=True),
    "llama_scaled_rope": hf.LlamaConfig(
        **BASE,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "mistral_sliding": hf.MistralConfig(**BASE, sliding_window=8),
    "qwen2_sliding": hf.Qwen2Config(**BASE, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": hf.Qwen3Config(**BASE, head_dim=16),
}  # fmt: skip
UNKNOWN = {
    "gemma2": hf.Gemma2Config(**BASE, head_dim=8, query_pre_attn_scalar=8),
    "mixtral": hf.MixtralConfig(**BASE, num_local_experts=4),
    "phi3": hf.Phi3Config(**BASE),
}


@pytest.fixture
def make(build: Callable[..., Any]) -> Callable[..., Any]:
    """`build`, with norms and biases that matter too."""

    def randomised(config: Any, **kwargs: Any) -> Any:
        model = build(config, **kwargs)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, mean=1.0, std=0.3)
        return model

    return randomised


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("name", KNOWN)
def test_decoding_equals_the_models_own_forward(make: Callable[..., Any], name: str, dtype: torch.dtype, allowed: float) -> None:
    model = make(KNOWN[name]).to(dtype)
    with decoding(model):
        assert fusable(model)
        assert decoding_gap(model, read_traits(model), FusedForward(model)) < allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KNOWN)
def test_every_rounding_is_that_of_the_modules(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", 16)
    model = make(KNOWN[name]).to(dtype)
    prompts = [tuple((7 * i + 3 * j) % 97 for j in range(length)) for i, length in enumerate((40, 3, 21, 1))]

    def logits(forward: Any) -> torch.Tensor:
        decoder = SlotDecoder(model, read_traits(model), slots=4, max_len=48, forward=forward)
        decoder.admit(prompts, [0] * 4)
        first = decoder.step()
        decoder.feed(torch.arange(4))
        return torch.cat([first, decoder.step()]).float()

    with decoding(model):
        fused = logits(FusedForward(model))
        with prepacked(model):
            plain = logits(PlainForward(model))
    # What differs is the order of sums in norms; in bf16 that seldom tips a rounding.
    assert (fused - plain).norm() <= (1e-6 if dtype == torch.float32 else 5e-3) * plain.norm()


def test_it_keeps_the_weights_of_its_creation_and_asks_no_module(make: Callable[..., Any]) -> None:
    model = make(KNOWN["llama"])
    with decoding(model):
        forward, traits = FusedForward(model), read_traits(model)
        before = decoding_gap(model, traits, forward)
        model.model.layers[1].mlp.up_proj.weight.mul_(3)
        assert before < 1e-5 < 1e-2 < decoding_gap(model, traits, forward)
        assert decoding_gap(model, traits, FusedForward(model)) < 1e-5


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_architectures_keep_their_own_forward(build: Callable[..., Any], name: str) -> None:
    model = build(UNKNOWN[name])
    with decoding(model):
        assert not fusable(model)


class Doubling(nn.Linear):
    """Computes something else."""


def _replace_linear(model: Any) -> Any:
    model.model.layers[0].mlp.up_proj = Doubling(32, 64, bias=False)
    return model


def _hook(model: Any) -> Any:
    model.model.layers[0].register_forward_hook(lambda *_: None)
    return model


def _forward(model: Any) -> Any:
    model.model.norm.forward = model.model.norm.forward
    return model


CHANGES: dict[str, Callable[[Any], Any]] = {
    "adapters": lambda model: get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")),
    "a linear of another class": _replace_linear,
    "a hook": _hook,
    "a forward of somebody": _forward,
    "double precision": lambda model: model.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_wants_its_modules_called_keeps_them(build: Callable[..., Any], change: str) -> None:
    model = CHANGES[change](build(KNOWN["llama"]))
    with decoding(model):
        assert not fusable(model)


def test_the_eager_kernel_that_somebody_chose_is_kept(build: Callable[..., Any]) -> None:
    model = build(KNOWN["llama"], attention="eager")
    with decoding(model):
        assert not fusable(model)
