"""4-bit layers: NF4 as the paper has it, small, frozen, with gradients through them; refused early where they cannot be."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_dist.config.errors import UserError
from rlhf_dist.models.linear4bit import Linear4bit
from rlhf_dist.models.quantisation import check_layers, dequantised, quantise

TOKENS = torch.arange(8)[None]


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**(size | options), max_position_embeddings=32, initializer_range=0.2)).eval()


def quantised(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = llama(**options).to(dtype)
    quantise(model, dtype, "here")
    return model


def test_all_linear_layers_but_the_head_are_held_in_4_bits_and_frozen() -> None:
    model = quantised()
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert kinds.pop("lm_head") is nn.Linear and len(kinds) == 2 * 7 and set(kinds.values()) == {Linear4bit}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_classifiers_head_stays_as_it_is() -> None:
    model: Any = LlamaForSequenceClassification(llama().config)
    want = model.score.weight.clone()
    quantise(model, torch.float32, "here")
    assert type(model.score) is nn.Linear and torch.equal(model.score.weight, want)


def test_forwards_without_gradient_leave_the_weights_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes' own layer repacks them, rounds products to bf16 and passes no gradient from then on."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = quantised()
    packed = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        want = model(TOKENS).logits
    assert all(torch.equal(parameter, packed[name]) for name, parameter in model.named_parameters())
    model.lm_head.requires_grad_(True)
    assert torch.equal(model(TOKENS).logits, want)


def test_weights_are_nearly_the_same_in_an_eighth_of_the_bytes() -> None:
    def layers(model: Any) -> list[Any]:
        return [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]

    plain, small = layers(llama()), layers(quantised())
    states = [layer.weight.quant_state for layer in small]
    scales = sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
    assert sum(layer.weight.nbytes for layer in small) + scales < (4 + 0.3) / 32 * sum(layer.weight.nbytes for layer in plain)
    for before, after in zip(plain, small, strict=True):
        error = float((dequantised(after) - before.weight).norm() / before.weight.norm())
        assert 0.05 < error < 0.12  # of normal weights NF4 loses about 9 %


def test_a_state_dict_holds_the_model_s_names_and_no_others() -> None:
    assert list(quantised().state_dict()) == list(llama().state_dict())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_whose_inputs_are_no_multiple_of_64_is_refused_by_name(device: str) -> None:
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**(llama().config.to_dict() | {"intermediate_size": 96})))
    with pytest.raises(UserError, match=r"the layer model\.layers\.0\.mlp\.down_proj has 96 inputs; .* multiples of 64") as caught:
        check_layers(model, "here", on_gpu=False)
    assert caught.value.where == "here" and "GPU" in caught.value.fix
    check_layers(model, "here", on_gpu=True)


def test_an_architecture_without_linear_layers_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=40, n_embd=64, n_layer=1, n_head=2, n_positions=16))
    with pytest.raises(UserError, match=r"only 0 of \d+ weights are in linear layers"):
        quantise(model, torch.float32, "here")
