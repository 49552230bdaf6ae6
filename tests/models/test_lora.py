"""Adapters: the identity at first, the base untouched by training, and merged weights equal to peft's own merge."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_dist.config.engines import LoraSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.models.lora import add_adapter, named_weights, trained_weights
from rlhf_dist.models.quantisation import dequantised, quantise

TOKENS = torch.arange(8)[None]


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def trained(model: Any) -> Any:
    """A few real optimizer steps on the adapter."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def exported(model: Any) -> dict[str, torch.Tensor]:
    return {name: compute().clone() for name, _, compute in named_weights(model)}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_adapter_starts_as_the_identity_and_only_it_is_trained(name, tiny_config) -> None:
    plain = model_of(tiny_config(name))
    want = plain(TOKENS).logits
    adapted = add_adapter(model_of(tiny_config(name)), LoraSection(r=2), seed=1)
    assert torch.equal(adapted(TOKENS).logits, want)
    assert {"lora_" in key for key, p in adapted.named_parameters() if p.requires_grad} == {True}
    assert not any(p.requires_grad for key, p in adapted.named_parameters() if "lora_" not in key)


def test_training_moves_the_adapter_and_never_the_base(tiny_config) -> None:
    want = model_of(tiny_config("llama"))(TOKENS).logits
    adapted = trained(add_adapter(model_of(tiny_config("llama")), LoraSection(r=2), seed=1))
    assert not torch.allclose(adapted(TOKENS).logits, want, atol=1e-3)
    with adapted.disable_adapter():
        assert torch.equal(adapted(TOKENS).logits, want)
    assert any(p.requires_grad for p in adapted.parameters())


def test_the_seed_decides_and_the_global_random_state_is_left_alone(tiny_config) -> None:
    def draws(seed: int) -> list[torch.Tensor]:
        return [p for key, p in add_adapter(model_of(tiny_config("llama")), LoraSection(r=2), seed).named_parameters() if "lora_A" in key]

    before = torch.random.get_rng_state()
    first, again, other = draws(3), draws(3), draws(4)
    model_of(tiny_config("llama"))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    torch.random.set_rng_state(before)
    model = model_of(tiny_config("llama"))
    state = torch.random.get_rng_state()
    add_adapter(model, LoraSection(r=2), seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "options", "targets"),
    [
        ("llama", {}, "all-linear"),
        ("llama", {"attention_bias": True}, ["q_proj", "v_proj"]),
        ("llama", {}, ["q_proj", "embed_tokens"]),
        ("gpt2", {}, "all-linear"),
    ],
)
def test_merged_weights_are_what_peft_merges(name, options, targets, tiny_config) -> None:
    """Under Hugging Face names; with biases, an adapted embedding, and GPT-2's transposed layers."""
    config = tiny_config(name, **options)
    adapted = trained(add_adapter(model_of(config), LoraSection(r=2, alpha=5.0, target_modules=targets), seed=1))
    got = exported(adapted)
    assert isinstance(adapted, PeftModel)
    merged = adapted.merge_and_unload()
    want = dict(merged.named_parameters())
    assert set(got) == set(want)
    assert all(torch.equal(got[key], want[key]) for key in want)
    fresh = dict(model_of(config).named_parameters())
    assert any(not torch.equal(got[key], fresh[key]) for key in fresh), "training should have moved something"


@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_model_exports_its_parameters_a_tied_one_once(tied, tiny_config) -> None:
    model = model_of(tiny_config("llama", tie_word_embeddings=tied))
    got = exported(model)
    assert list(got) == [name for name, _ in model.named_parameters()] and ("lm_head.weight" in got) is not tied
    assert all(torch.equal(got[name], parameter) for name, parameter in model.named_parameters())


def test_buffers_that_a_checkpoint_holds_are_exported_too(tiny_config) -> None:
    model = model_of(tiny_config("llama"))
    model.register_buffer("scale", torch.tensor([2.0]))
    model.register_buffer("cache", torch.tensor([3.0]), persistent=False)
    assert exported(model)["scale"].tolist() == [2.0] and "cache" not in exported(model)
    assert exported(add_adapter(model, LoraSection(r=2), seed=1))["scale"].tolist() == [2.0]


@pytest.mark.parametrize("targets", [["nope"], ["q_proj", "nope"], ["self_attn"]])
def test_a_module_that_cannot_be_adapted_is_named(targets, tiny_config) -> None:
    """peft alone would pass over an unknown name as long as another one fits."""
    with pytest.raises(UserError, match=targets[-1] if targets[-1] == "nope" else "fits no module") as caught:
        add_adapter(model_of(tiny_config("llama")), LoraSection(target_modules=targets), seed=1)
    assert caught.value.where == "lora.target_modules"


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_tied_embeddings_is_refused(target, tiny_config) -> None:
    """Merged, it would change the other end of the model as well: the export would not be what was trained."""
    with pytest.raises(UserError, match="tied"):
        add_adapter(model_of(tiny_config("llama", tie_word_embeddings=True)), LoraSection(target_modules=["q_proj", target]), seed=1)


def test_trained_weights_are_the_adapters_as_they_are_under_the_models_own_names(tiny_config) -> None:
    adapted = trained(add_adapter(model_of(tiny_config("llama")), LoraSection(r=2), seed=1))
    got, own = {name: (needed, compute()) for name, needed, compute in trained_weights(adapted)}, dict(adapted.named_parameters())
    assert got.keys() == {name for name in own if "lora_" in name} and len(got) == 2 * 2 * 7
    assert all(needed == [own[name]] and torch.equal(weight, own[name]) for name, (needed, weight) in got.items())
    plain = model_of(tiny_config("llama"))
    assert [name for name, _, _ in trained_weights(plain)] == [name for name, _ in plain.named_parameters()]


@pytest.mark.parametrize(("name", "targets"), [("llama", ["q_proj", "embed_tokens"]), ("gpt2", "all-linear")])
def test_in_half_precision_a_merged_weight_is_rounded_once(name, targets, tiny_config) -> None:
    """Adapter and base in bf16, as engines hold them. Both summands rounded first would not be the weight nearest to the trained one."""
    adapted = trained(add_adapter(model_of(tiny_config(name)), LoraSection(r=2, target_modules=targets), seed=1)).bfloat16()
    got = exported(adapted)
    exact, twice = adapted.double().merge_and_unload().state_dict(), 0
    base = model_of(tiny_config(name)).bfloat16().double().state_dict()
    for key, weight in got.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, exact[key].bfloat16()), key
        twice += int((base[key] + (exact[key] - base[key]).bfloat16().double()).bfloat16().ne(weight).sum())
    assert twice > 0, "rounding twice should show somewhere"


def test_adapters_have_the_precision_of_the_model(tiny_config) -> None:
    """The engine's do: peft's default, fp32 beside a bf16 model, would not hold what the engine sends."""
    assert {p.dtype for p in add_adapter(model_of(tiny_config("llama")).bfloat16(), LoraSection(r=2), seed=1).parameters()} == {
        torch.bfloat16
    }


# --- over 4-bit layers ------------------------------------------------------------------------------------------------------------------


def in_4_bits(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    model = model_of(config).to(dtype)
    quantise(model, dtype, "here")
    return model


@pytest.fixture
def wide_config(tiny_config) -> Any:
    return tiny_config("llama", hidden_size=64, intermediate_size=64)


def test_over_4_bits_the_adapter_learns_and_the_merged_model_answers_as_it_does(wide_config) -> None:
    adapted = add_adapter(in_4_bits(wide_config), LoraSection(r=2, alpha=4.0), seed=1)
    first = adapted(input_ids=TOKENS, labels=TOKENS).loss
    want = trained(adapted)(TOKENS)
    assert adapted(input_ids=TOKENS, labels=TOKENS).loss < 0.8 * first
    got = exported(adapted)
    plain = model_of(wide_config)
    assert {name: weight.shape for name, weight in got.items()} == {name: weight.shape for name, weight in plain.named_parameters()}
    plain.load_state_dict(got)
    torch.testing.assert_close(plain(TOKENS).logits, want.logits, rtol=1e-5, atol=1e-5)


def test_over_4_bits_a_merged_weight_is_rounded_once_to_the_compute_precision(wide_config) -> None:
    adapted = trained(add_adapter(in_4_bits(wide_config, torch.bfloat16), LoraSection(r=2, alpha=4.0), seed=1))
    got = exported(adapted)
    assert {p.dtype for p in adapted.parameters()} == {torch.bfloat16, torch.uint8}
    layer = adapted.get_base_model().model.layers[1].mlp.up_proj
    exact = dequantised(layer.base_layer).double() + 2.0 * (layer.lora_B.default.weight.double() @ layer.lora_A.default.weight.double())
    assert torch.equal(got["model.layers.1.mlp.up_proj.weight"], exact.bfloat16())


def test_a_quantised_model_without_adapters_is_written_out_whole(wide_config) -> None:
    model = in_4_bits(wide_config)
    got = exported(model)
    plain = model_of(wide_config)
    assert got.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(got)
    torch.testing.assert_close(plain(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)


# --- with a head ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 4])
def test_a_head_is_trained_whole_beside_the_adapters(bits, wide_config) -> None:
    wide_config.num_labels, wide_config.pad_token_id = 1, 0
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_config(wide_config).eval()
    if bits == 4:
        quantise(model, torch.float32, "here")
    adapted = add_adapter(model, LoraSection(r=2), seed=1, head="score")
    learns = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name for name in learns if "lora_" not in name} == {"base_model.model.score.weight"} and len(learns) == 1 + 2 * 2 * 7
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    head = model.score.weight.clone()
    for _ in range(5):
        (adapted(TOKENS).logits - 3.0).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.score.weight, head)
    got = exported(adapted)
    plain: Any = AutoModelForSequenceClassification.from_config(wide_config).eval()
    plain.load_state_dict(got)
    torch.testing.assert_close(plain(TOKENS).logits, adapted(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert {name for name, *_ in trained_weights(adapted)} == learns
