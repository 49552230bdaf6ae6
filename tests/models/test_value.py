"""The value model's forward against a loop over unpadded rows: V[t] at the state before token t, the bootstrap after the last."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_dist.config.engines import EngineSection
from rlhf_dist.models.loading import load_token_scorer
from rlhf_dist.models.value import ValueModule

MODELS = ("llama", "gpt2", "qwen2", "gemma2")
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


@pytest.mark.parametrize("rows", [ROWS, FULL], ids=["ragged", "at the context limit"])
@pytest.mark.parametrize("name", MODELS)
def test_values_stand_before_their_tokens_and_the_bootstrap_after_the_last(name, rows, model_of, padded) -> None:
    model, batch = model_of(name), padded(rows, extra=1)
    module = ValueModule(model)
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


@pytest.mark.parametrize("name", MODELS)
def test_garbage_in_padded_slots_changes_nothing_bit_for_bit(name, model_of, padded) -> None:
    model = model_of(name)
    module, seen = ValueModule(model), []
    for garbage in (0, 39, 10**15, -1):
        batch = padded(ROWS, extra=2, garbage=garbage)
        outputs = module(**module.inputs(batch))
        model.zero_grad()
        torch.where(batch.response_mask_BT, outputs["values_BT"], 0.0).square().sum().backward()
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


def test_a_blank_counts_for_nothing(model_of) -> None:
    model = model_of("llama")
    module = ValueModule(model)
    module(**module.inputs(module.blank()))["values_BT"].sum().mul(0.0).backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
