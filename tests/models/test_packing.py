"""Packed rows: what one sequence gets is what it gets alone, whatever stands beside it; architectures that leak are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, Mamba2Config, MixtralConfig, OPTConfig

from rlhf_dist.config.engines import LoraSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.models.logprobs import HeadOptions
from rlhf_dist.models.lora import add_adapter
from rlhf_dist.models.packing import first_fit, packed_inputs
from rlhf_dist.models.policy import PolicyModule

MODELS = ("llama", "gpt2", "qwen2", "gemma2")
Rows = list[tuple[list[int], list[int]]]
tokens = st.lists(st.integers(1, 39), min_size=1, max_size=6)
ragged = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=7)
NEIGHBOURS: Rows = [([5, 6], [7, 2, 9]), ([8], [9, 10, 11, 12, 13]), ([14, 15, 16, 17, 18], [2, 4, 6]), ([20], [2]), ([21, 22], [23])]


@pytest.fixture(scope="module")
def model_of(tiny_config: Callable[..., Any]) -> Callable[..., Any]:
    made: dict[tuple[Any, ...], Any] = {}

    def make(name: str, **options: Any) -> Any:
        key = (name, *sorted(options.items()))
        if key not in made:
            torch.manual_seed(0)
            made[key] = AutoModelForCausalLM.from_config(tiny_config(name, **options)).eval()
        return made[key]

    return make


def outputs_and_gradient(module: PolicyModule, batch: SequenceBatch) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Valid slots of the outputs, flat, and the gradient of their sum."""
    module.zero_grad()
    outputs = module(**module.inputs(batch))
    valid = {name: values[batch.response_mask_BT] for name, values in outputs.items()}
    torch.stack(list(valid.values())).sum().backward()
    return {name: values.detach() for name, values in valid.items()}, [p.grad.clone() for p in module.parameters() if p.grad is not None]


def test_the_example_of_the_module(padded: Callable[..., SequenceBatch]) -> None:
    inputs, slots_N, places_BT = packed_inputs(padded([([1], [2, 3, 4]), ([5, 6], [7])], garbage=88))
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]] and set(inputs) == {"input_ids", "position_ids"}
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]
    assert slots_N.tolist() == [1, 2, 3, 6] and places_BT.tolist() == [[0, 1, 2], [3, 4, 4]]


@settings(deadline=None)
@given(rows=ragged, extra=st.integers(0, 3), step=st.sampled_from([1, 4, 32]), one_row=st.booleans())
def test_every_sequence_stands_whole_in_one_row(padded: Any, rows: Rows, extra: int, step: int, one_row: bool) -> None:
    inputs, slots_N, places_BT = packed_inputs(padded(rows, extra, garbage=10**6), step, one_row=one_row)
    ids, positions = inputs["input_ids"], inputs["position_ids"]
    assert ids.dtype == positions.dtype == torch.int64 and ids.shape == positions.shape and ids.shape[1] % step == 0
    lengths = [len(p) + len(r) for p, r in rows]
    whole = sum(lengths) if one_row else max(lengths)
    assert 0 <= ids.shape[1] - whole < step and (not one_row or len(ids) == 1)
    used = torch.zeros_like(ids, dtype=torch.bool).flatten()
    for number, (prompt, response) in enumerate(rows):
        last = int(slots_N[places_BT[number, len(response) - 1]])
        here = slice(last + 1 - lengths[number], last + 1)
        assert here.start // ids.shape[1] == last // ids.shape[1], "in one row"
        assert ids.flatten()[here].tolist() == prompt + response and positions.flatten()[here].tolist() == list(range(lengths[number]))
        assert slots_N[places_BT[number, : len(response)]].tolist() == list(range(last + 1 - len(response), last + 1))
        assert (places_BT[number, len(response) :] == len(slots_N)).all() and not used[here].any()
        used[here] = True
    assert not ids.flatten()[~used].any() and not positions.flatten()[~used].any()


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40), room=st.integers(0, 20))
def test_first_fit_wastes_little(lengths: list[int], room: int) -> None:
    width = max(lengths) + room
    starts, rows = first_fit(lengths, width)
    slots = [slot for start, length in zip(starts, lengths, strict=True) for slot in range(start, start + length)]
    assert len(set(slots)) == sum(lengths) and max(slots) < rows * width
    assert all(start // width == (start + length - 1) // width for start, length in zip(starts, lengths, strict=True))
    assert rows <= max(1, 2 * sum(lengths) / width), "two rows half empty would have been one"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_padded(name: str, attention: str, model_of: Any, padded: Any) -> None:
    """To the rounding of fp32, gradients too, over random ragged batches."""
    model = model_of(name, attn_implementation=attention)
    options = HeadOptions(temperature=0.7, entropy_grad=True, chunk_tokens=5)
    one, other = PolicyModule(model, options), PolicyModule(model, options, packing=True)

    @settings(deadline=None, max_examples=12)
    @given(rows=ragged, extra=st.integers(0, 2))
    def check(rows: Rows, extra: int) -> None:
        batch = padded(rows, extra, garbage=10**6)
        (want, want_gradient), (found, gradient) = outputs_and_gradient(one, batch), outputs_and_gradient(other, batch)
        for key in want:
            torch.testing.assert_close(found[key], want[key], rtol=1e-5, atol=2e-5)
        for mine, reference in zip(gradient, want_gradient, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4 * max(1.0, float(reference.abs().max())))

    check()


def test_every_sequence_of_one_long_row_gets_what_it_gets_alone(model_of: Any, padded: Any) -> None:
    """The form that flash attention is given, here with a kernel that a CPU has."""
    model = model_of("llama")
    module, batch = PolicyModule(model), padded(NEIGHBOURS)
    with torch.no_grad():
        want = module(**module.inputs(batch))["logprobs_BT"]
        grid, slots_N, places_BT = packed_inputs(batch, 32, one_row=True)
        found = module(tokens=grid, places_BT=places_BT, slots_N=slots_N)["logprobs_BT"]
    assert grid["input_ids"].shape == (1, 32)
    torch.testing.assert_close(found[batch.response_mask_BT], want[batch.response_mask_BT], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_neighbours_are_not_heard_bit_for_bit(name: str, attention: str, dtype: torch.dtype, model_of: Any, padded: Any) -> None:
    """Other tokens of equal lengths beside a sequence change neither its outputs nor the gradient of its outputs."""
    module = PolicyModule(copy.deepcopy(model_of(name, attn_implementation=attention)).to(dtype), packing=True)
    seen = []
    for shift in (0, 5, 11):
        others = [([1 + (t + shift) % 39 for t in p], [1 + (t + shift) % 39 for t in r]) for p, r in NEIGHBOURS]
        batch = padded([*others[:3], NEIGHBOURS[3], *others[4:]])
        module.zero_grad()
        outputs = module(**module.inputs(batch))
        alone = torch.zeros_like(batch.response_mask_BT)
        alone[3] = batch.response_mask_BT[3]
        torch.where(alone, outputs["logprobs_BT"], 0.0).sum().backward()
        backbone = [p.grad.clone() for key, p in module.named_parameters() if p.grad is not None and p.dim() == 2 and "layers.0" in key]
        seen.append([outputs[key][3, :1].detach() for key in outputs] + backbone)
    assert all(torch.isfinite(x).all() for x in seen[0])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_garbage_in_masked_slots_changes_nothing_bit_for_bit(name: str, model_of: Any, padded: Any) -> None:
    """Law 1, packed."""
    module = PolicyModule(model_of(name), HeadOptions(entropy_grad=True), packing=True)
    seen = []
    for garbage in (0, 39, 10**6, -1):
        outputs, gradient = outputs_and_gradient(module, padded(NEIGHBOURS, extra=2, garbage=garbage))
        seen.append([*outputs.values(), *gradient])
    assert all(torch.isfinite(x).all() for x in seen[0]) and any(x.any() for x in seen[0])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_the_head_runs_on_the_slots_that_predict_and_on_no_others(model_of: Any, padded: Any) -> None:
    model, shapes = model_of("llama"), list[tuple[int, ...]]()
    module = PolicyModule(model, packing=True)
    handle = model.lm_head.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    module(**module.inputs(padded([([1, 2, 3, 4, 5, 6], [7, 8]), ([9], [10])])))
    handle.remove()
    assert shapes == [(1, 3, 40)]


def test_a_blank_has_a_gradient_of_zero(model_of: Any) -> None:
    module = PolicyModule(model_of("llama"), packing=True)
    module.zero_grad()
    module(**module.inputs(module.blank()))["logprobs_BT"].sum().mul(0.0).backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_with_an_adapter_on_and_off(tiny_config: Callable[..., Any], padded: Any) -> None:
    torch.manual_seed(0)
    model = add_adapter(AutoModelForCausalLM.from_config(tiny_config("llama")).eval(), LoraSection(r=2), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    one, other, batch = PolicyModule(model), PolicyModule(model, packing=True), padded(NEIGHBOURS)
    for adapter in (True, False):
        with torch.no_grad():
            want, found = (module(**module.inputs(batch), adapter=adapter)["logprobs_BT"] for module in (one, other))
        torch.testing.assert_close(found[batch.response_mask_BT], want[batch.response_mask_BT], rtol=1e-5, atol=2e-5)


def test_flash_attention_is_given_one_row(tiny_config: Callable[..., Any], padded: Any) -> None:
    """In several rows it would take every row for one sequence (transformers looks at the positions of a single row only)."""
    module = PolicyModule(AutoModelForCausalLM.from_config(tiny_config("llama")).eval(), packing=True)
    assert module.inputs(padded(NEIGHBOURS))["tokens"]["input_ids"].shape == (3, 8)
    module.model.config._attn_implementation = "flash_attention_2"
    assert module.inputs(padded(NEIGHBOURS))["tokens"]["input_ids"].shape == (1, 24)


def test_a_response_without_a_prompt_is_refused(padded: Any) -> None:
    batch = padded([([1], [2, 3]), ([1], [4])])
    with pytest.raises(ValueError, match="without a prompt token"):
        packed_inputs(batch.replace(prompt_mask_BP=torch.tensor([[True], [False]])))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (OPTConfig(vocab_size=40, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16), "OPT"),
        (BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2), "Bloom"),
        (Mamba2Config(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=8, n_groups=1), "Mamba2"),
    ],
    ids=["masks of its own", "alibi", "recurrent"],
)
def test_an_architecture_that_leaks_is_refused(config: Any, name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    PolicyModule(model)
    with pytest.raises(UserError, match=f"{name}ForCausalLM cannot be packed: sequences in one row see each other") as caught:
        PolicyModule(model, packing=True)
    assert "packing: false" in caught.value.fix


def test_wrong_positions_are_refused(model_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose second sequence in a row does not start at position 0 sees no neighbour, and is wrong all the same."""
    model = model_of("gpt2")
    table = model.transformer.wpe.weight
    monkeypatch.setattr(
        model.transformer.wpe, "forward", lambda ids: torch.nn.functional.embedding(torch.arange(ids.shape[1])[None], table)
    )
    with pytest.raises(UserError, match=r"GPT2LMHeadModel cannot be packed: its log-probs are .* off"):
        PolicyModule(model, packing=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_compute_together_are_no_leak(dtype: torch.dtype, padded: Any) -> None:
    """The sizes of the experts' products follow the neighbours' tokens, so bits may change, though nothing is seen."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=40, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        num_local_experts=8, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    one, other, batch = PolicyModule(model), PolicyModule(model, packing=True), padded(NEIGHBOURS)
    with torch.no_grad():
        want, found = (module(**module.inputs(batch))["logprobs_BT"][batch.response_mask_BT] for module in (one, other))
    torch.testing.assert_close(found, want, rtol=1e-5 if dtype == torch.float32 else 5e-2, atol=2e-5)
