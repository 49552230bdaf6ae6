"""The value model's forward against a loop over unpadded rows: V[t] at the state before token t, the bootstrap after the last."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, OPTConfig

from rlhf_dist.config.engines import EngineSection, LoraSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.models.loading import load_token_scorer
from rlhf_dist.models.lora import add_adapter
from rlhf_dist.models.value import ValueModule

MODELS = ("llama", "gpt2", "qwen2", "gemma2")
tokens = st.lists(st.integers(1, 39), min_size=1, max_size=6)
ragged = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=6)
ROWS = [([5, 6], [7, 2]), ([8], [9, 10, 11, 12, 13]), ([14, 15, 16, 17, 18], [2]), ([20], [2])]
FULL = [([3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13, 14]), ([6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [30, 31]), ([1], [2])]


@pytest.fixture(scope="module")
def model_of(tiny_config: Callable[..., Any]) -> Callable[..., Any]:
    def make(name: str, **options: Any) -> Any:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(tiny_config(name, num_labels=1, pad_token_id=0, **options)).eval()

    return make


def states(model: Any, tokens: list[int]) -> Tensor:
    """The head's answer at every position of one row without padding."""
    hidden = model.base_model(input_ids=torch.tensor([tokens])).last_hidden_state
    return model.score(hidden)[0, :, 0]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("rows", [ROWS, FULL], ids=["ragged", "at the context limit"])
@pytest.mark.parametrize("name", MODELS)
def test_values_stand_before_their_tokens_and_the_bootstrap_after_the_last(name, rows, packing, model_of, padded) -> None:
    model, batch = model_of(name), padded(rows, extra=1)
    module = ValueModule(model, packing=packing)
    with torch.no_grad():
        outputs = module(**module.inputs(batch))
        for row, (prompt, response) in enumerate(rows):
            want = states(model, prompt + response)
            before = want[len(prompt) - 1 : len(prompt) - 1 + len(response)]  # V[t] at position P − 1 + t
            torch.testing.assert_close(outputs["values_BT"][row, : len(response)], before, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(outputs["bootstrap_value_B"][row], want[len(prompt) + len(response) - 1], rtol=1e-5, atol=1e-5)
    assert outputs["values_BT"].shape == batch.response_tokens_BT.shape and outputs["values_BT"].dtype == torch.float32


def test_the_bootstrap_is_what_the_exported_classifier_answers(model_of, padded) -> None:
    model = model_of("llama")
    module = ValueModule(model)
    with torch.no_grad():
        got = module(**module.inputs(padded(ROWS)))["bootstrap_value_B"]
        want = torch.cat([model(input_ids=torch.tensor([prompt + response])).logits[0] for prompt, response in ROWS])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_bootstrap_is_read_and_never_trained_on(model_of, padded) -> None:
    module = ValueModule(model_of("llama"))
    outputs = module(**module.inputs(padded(ROWS)))
    assert outputs["values_BT"].requires_grad and not outputs["bootstrap_value_B"].requires_grad


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_garbage_in_padded_slots_changes_nothing_bit_for_bit(name, packing, model_of, padded) -> None:
    model = model_of(name)
    module, seen = ValueModule(model, packing=packing), []
    for garbage in (0, 39, 10**15, -1):
        batch = padded(ROWS, extra=2, garbage=garbage)
        outputs = module(**module.inputs(batch))
        model.zero_grad()
        torch.where(batch.response_mask_BT, outputs["values_BT"], 0.0).square().sum().backward()
        outputs["values_BT"] = torch.where(batch.response_mask_BT, outputs["values_BT"], 0.0)
        seen.append([*outputs.values(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert all(torch.isfinite(x).all() for x in seen[0]) and any(x.any() for x in seen[0][2:])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_value_model_says_zero_everywhere_and_can_learn(name, tiny_config, padded, tmp_path) -> None:
    AutoModelForCausalLM.from_config(tiny_config(name)).save_pretrained(tmp_path)
    module = ValueModule(load_token_scorer(EngineSection(), str(tmp_path), zero_head=True))
    outputs = module(**module.inputs(padded(ROWS)))
    assert not outputs["values_BT"].any() and not outputs["bootstrap_value_B"].any()
    (outputs["values_BT"] - 1).square().sum().backward()
    assert module.model.score.weight.grad.any()


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_give_the_values_and_the_gradient_of_padded_ones(name, model_of, padded) -> None:
    model, found = model_of(name), []

    @settings(deadline=None, max_examples=12)
    @given(rows=ragged, extra=st.integers(0, 2))
    def check(rows, extra) -> None:
        batch = padded(rows, extra, garbage=10**6)
        for packing in (False, True):
            module = modules[packing]
            module.zero_grad()
            outputs = module(**module.inputs(batch))
            values = outputs["values_BT"][batch.response_mask_BT]
            values.square().sum().backward()
            found.append(
                [values.detach(), outputs["bootstrap_value_B"], *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            )
        one, other = found[-2:]
        for mine, reference in zip(other, one, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4 * max(1.0, float(reference.abs().max())))

    modules = [ValueModule(model, packing=packing) for packing in (False, True)]
    check()


def test_a_packed_neighbour_is_not_heard_bit_for_bit(model_of, padded) -> None:
    module, seen = ValueModule(model_of("llama"), packing=True), []
    for shift in (0, 5, 11):
        others = [([1 + (t + shift) % 39 for t in p], [1 + (t + shift) % 39 for t in r]) for p, r in ROWS]
        batch = padded([*others[:3], ROWS[3]])
        module.zero_grad()
        outputs = module(**module.inputs(batch))
        outputs["values_BT"][3, 0].backward()
        gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None and p.dim() == 2]
        embeddings = gradients[0][batch.prompt_tokens_BP[3, -1]]  # of the others some tokens are the same ones
        seen.append([outputs["values_BT"][3, 0].detach(), outputs["bootstrap_value_B"][3], embeddings, *gradients[1:]])
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("zero_head", [True, False])
def test_a_leak_is_found_although_the_head_says_zero(zero_head) -> None:
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    model = AutoModelForSequenceClassification.from_config(OPTConfig(**sizes, num_labels=1)).eval()
    if zero_head:
        torch.nn.init.zeros_(model.score.weight)
    ValueModule(model)
    with pytest.raises(UserError, match="OPTForSequenceClassification cannot be packed: sequences in one row see each other"):
        ValueModule(model, packing=True)


def test_a_packed_value_model_may_start_at_zero_or_be_adapted(model_of, padded) -> None:
    model = model_of("llama")
    torch.nn.init.zeros_(model.score.weight)
    module = ValueModule(model, packing=True)
    assert not module(**module.inputs(padded(ROWS)))["values_BT"].any(), "the head of the trial is gone"
    adapted = add_adapter(model_of("llama"), LoraSection(r=2), seed=0, head="score")
    one, other, batch = ValueModule(adapted), ValueModule(adapted, packing=True), padded(ROWS)
    want, got = (module(**module.inputs(batch)) for module in (one, other))
    mask = batch.response_mask_BT
    torch.testing.assert_close(got["values_BT"][mask], want["values_BT"][mask], rtol=1e-5, atol=1e-5)


def test_flash_attention_is_given_one_row(model_of, padded) -> None:
    module = ValueModule(model_of("llama"), packing=True)
    module.model.config._attn_implementation = "flash_attention_2"
    assert module.inputs(padded(ROWS))["tokens"]["input_ids"].shape == (1, 18)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_blank_counts_for_nothing(packing, model_of) -> None:
    model = model_of("llama")
    module = ValueModule(model, packing=packing)
    module(**module.inputs(module.blank()))["values_BT"].sum().mul(0.0).backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
