"""The policy's forward against the plain Hugging Face one, row by row without padding: log-probs, entropies, gradients, law 1."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_dist.config.engines import LoraSection
from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.models.logprobs import HeadOptions
from rlhf_dist.models.lora import add_adapter
from rlhf_dist.models.policy import PolicyModule

MODELS = ("llama", "gpt2", "qwen2", "gemma2")
ROWS = [([5, 6], [7, 2]), ([8], [9, 10, 11, 12, 13]), ([14, 15, 16, 17, 18], [2]), ([20], [2])]
FULL = [([3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13, 14]), ([6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [30, 31]), ([1], [2])]
"""Rows of 12 tokens, which is the context of the models, whose common padded width is 18."""


@pytest.fixture(scope="module")
def model_of(tiny_config: Callable[..., Any]) -> Callable[..., Any]:
    def make(name: str, **options: Any) -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(tiny_config(name, **options)).eval()

    return make


def alone(model: Any, prompt: list[int], response: list[int], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of one row by the model's own forward, without padding, mask or positions."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float()
    log_p = torch.log_softmax(logits / temperature, -1)
    return log_p.gather(1, torch.tensor(response)[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def valid(outputs: dict[str, Tensor], name: str, batch: SequenceBatch) -> list[Tensor]:
    return [row[mask] for row, mask in zip(outputs[name], batch.response_attention_BT, strict=True)]


@pytest.mark.parametrize("limit", [2**28, 0], ids=["logits", "streamed"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("rows", [ROWS, FULL], ids=["ragged", "at the context limit"])
@pytest.mark.parametrize("name", MODELS)
def test_a_padded_batch_gives_each_row_what_it_gets_alone(name, rows, packing, limit, model_of, padded) -> None:
    model, batch = model_of(name), padded(rows, extra=1)
    module = PolicyModule(model, HeadOptions(temperature=0.7, chunk_tokens=3, logits_bytes=limit), packing=packing)
    with torch.no_grad():
        outputs = module(**module.inputs(batch))
        want = [alone(model, prompt, response, 0.7) for prompt, response in rows]
    assert outputs["logprobs_BT"].shape == outputs["entropy_BT"].shape == batch.response_tokens_BT.shape
    for index, output in enumerate(("logprobs_BT", "entropy_BT")):
        for mine, reference in zip(valid(outputs, output, batch), want, strict=True):
            torch.testing.assert_close(mine, reference[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [2**28, 0], ids=["logits", "streamed"])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_the_rows_alone(name, limit, model_of, padded) -> None:
    model, batch = model_of(name), padded(ROWS)
    module = PolicyModule(model, HeadOptions(entropy_grad=True, chunk_tokens=3, logits_bytes=limit))
    outputs = module(**module.inputs(batch))
    sum(x.sum() for output in outputs for x in valid(outputs, output, batch)).backward()
    mine = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    sum(x.sum() for prompt, response in ROWS for x in alone(model, prompt, response, 1.0)).backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(mine[key], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_garbage_in_padded_slots_changes_nothing_bit_for_bit(name, attention, model_of, padded) -> None:
    """Law 1: outputs and gradients, and none of them NaN, though left-padded queries see no key at all."""
    model = model_of(name, attn_implementation=attention)
    module = PolicyModule(model, HeadOptions(entropy_grad=True))
    seen = []
    for garbage in (0, 39, 10**15, -1):
        batch = padded(ROWS, extra=2, garbage=garbage)
        outputs = module(**module.inputs(batch))
        model.zero_grad()
        torch.where(batch.response_mask_BT, outputs["logprobs_BT"] + outputs["entropy_BT"], 0.0).sum().backward()
        seen.append([*outputs.values(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.isfinite(x).all() for x in seen[0]) and any(x.any() for x in seen[0])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_rows_do_not_see_each_other(model_of, padded) -> None:
    module = PolicyModule(model_of("llama"))
    with torch.no_grad():
        first, second = (
            module(**module.inputs(padded([ROWS[1], other])))["logprobs_BT"][0, :5] for other in (([21, 22], [23]), ([31, 32], [33]))
        )
    assert torch.equal(first, second)


def test_the_head_runs_on_response_tokens_alone(model_of, padded) -> None:
    model = model_of("llama")
    module, shapes = PolicyModule(model), []
    model.lm_head.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    module(**module.inputs(padded([([1, 2, 3, 4, 5, 6], [7, 8]), ([9], [10])])))
    assert shapes == [(1, 3, 40)]


def test_only_existing_responses_count_where_a_batch_has_none(model_of, padded) -> None:
    module = PolicyModule(model_of("llama"))
    batch = padded([([1, 2], [3])])
    empty = batch.replace(
        **{name: getattr(batch, name)[:, :0] for name in ("response_tokens_BT", "response_mask_BT", "response_attention_BT")}
    )
    assert module(**module.inputs(empty))["logprobs_BT"].shape == (1, 0)


def test_a_blank_has_a_gradient_of_zero(model_of) -> None:
    model = model_of("llama")
    module = PolicyModule(model)
    module(**module.inputs(module.blank()))["logprobs_BT"].sum().mul(0.0).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_adapter_can_be_left_off(model_of, padded) -> None:
    model = model_of("llama")
    batch = padded(ROWS)
    base = PolicyModule(model)
    with torch.no_grad():
        plain = base(**base.inputs(batch))["logprobs_BT"]
        adapted = PolicyModule(add_adapter(model, LoraSection(r=2), seed=0))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        on, off = (adapted(**adapted.inputs(batch), adapter=use)["logprobs_BT"] for use in (True, False))
    assert torch.equal(off, plain) and not torch.allclose(on, plain)


def test_in_bf16_a_row_alone_gets_what_it_gets_among_others_bit_for_bit(model_of, padded) -> None:
    """Attention rounds differently at odd widths: 0.03 apart here without a common step."""
    generator = torch.Generator().manual_seed(0)
    lengths = [(3, 5), (11, 20), (1, 9), (17, 2)]
    rows = [tuple(torch.randint(0, 40, (n,), generator=generator).tolist() for n in pair) for pair in lengths]
    module = PolicyModule(model_of("llama", max_position_embeddings=64).bfloat16())
    batch = padded(rows, extra=1)
    with torch.no_grad():
        together = valid(module(**module.inputs(batch)), "logprobs_BT", batch)
        for row, mine in zip(rows, together, strict=True):
            single = padded([row])
            assert torch.equal(module(**module.inputs(single))["logprobs_BT"][0], mine)
    assert [module.inputs(padded([row]))["tokens"]["input_ids"].shape[1] for row in rows] == [16, 32, 16, 32]
