"""The streamed head: the same numbers and gradients as a whole log-softmax, in memory that the vocabulary does not set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf_dist.models import head as streamed
from rlhf_dist.models.head import is_plain, linear_logprobs


def whole(hidden: Tensor, head: nn.Linear, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """As it is written down."""
    log_p = (head(hidden).float() / temperature).log_softmax(-1)
    return log_p.gather(1, tokens[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "TOKENS", 5)
    monkeypatch.setattr(streamed, "COLUMNS", 7)


@given(st.integers(0, 2**16), st.integers(1, 13), st.integers(1, 30), st.booleans(), st.sampled_from([0.5, 1.0, 1.7]))
@settings(max_examples=40, deadline=None)
def test_values_and_gradients_are_those_of_a_whole_softmax(seed: int, rows: int, vocabulary: int, bias: bool, temperature: float) -> None:
    torch.manual_seed(seed)
    head = nn.Linear(6, vocabulary, bias=bias).double()
    tokens, weights = torch.randint(vocabulary, (rows,)), torch.randn(2, rows)
    found = []
    for function in (lambda h: linear_logprobs(h, head, tokens, temperature, True), lambda h: whole(h, head, tokens, temperature)):
        hidden = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(3).requires_grad_()
        head.zero_grad()
        logprobs, entropy = function(hidden)
        (logprobs * weights[0] + entropy * weights[1]).sum().backward()
        found.append([logprobs, entropy, hidden.grad, *(p.grad.clone() for p in head.parameters())])
    for mine, theirs in zip(*found, strict=True):  # fp32: the last bit of a logit of 20 is 2e-6, and gradients sum many such
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-4, atol=1e-4)


def test_without_a_gradient_of_the_entropy_it_has_none() -> None:
    head, hidden = nn.Linear(4, 20), torch.randn(3, 4, requires_grad=True)
    logprobs, entropy = linear_logprobs(hidden, head, torch.tensor([1, 2, 19]), 1.0, False)
    assert logprobs.requires_grad and not entropy.requires_grad


def test_logits_that_overflow_an_exponential_do_not_matter() -> None:
    head, tokens = nn.Linear(4, 20, bias=False), torch.tensor([0, 19, 5])
    hidden = (torch.randn(3, 4) * 1e4).requires_grad_()
    found, expected = linear_logprobs(hidden, head, tokens, 1.0, True), whole(hidden, head, tokens, 1.0)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-2)
    assert bool(found[1].isfinite().all())
    (found[0].sum() + found[1].sum()).backward()
    assert bool(hidden.grad.isfinite().all())  # type: ignore[union-attr]


def test_a_frozen_head_gets_no_gradient_and_no_rows_are_no_error() -> None:
    head, hidden = nn.Linear(4, 20).requires_grad_(False), torch.randn(3, 4, requires_grad=True)
    linear_logprobs(hidden, head, torch.tensor([1, 2, 3]), 1.0, False)[0].sum().backward()
    assert head.weight.grad is None and hidden.grad is not None
    assert linear_logprobs(hidden[:0], head, torch.zeros(0, dtype=torch.long), 1.0, False)[0].shape == (0,)


def test_no_tensor_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "TOKENS", 64)
    monkeypatch.setattr(streamed, "COLUMNS", 128)
    head, hidden = nn.Linear(8, 50_000, bias=False), torch.randn(256, 8, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max([largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor))])
            return result

    with Watch():
        linear_logprobs(hidden, head, torch.randint(50_000, (256,)), 1.0, False)[0].sum().backward()
    assert largest == head.weight.numel() < 256 * 50_000 / 4  # its gradient is the largest there is


def tiny(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, **changes)
    )


def test_heads_whose_logits_are_changed_afterwards_are_told() -> None:
    assert is_plain(tiny()) and is_plain(tiny(tie_word_embeddings=True))
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    capped = AutoConfig.for_model("gemma2", **shape, num_key_value_heads=2, head_dim=8, final_logit_softcapping=1.0)
    scaled = AutoConfig.for_model("granite", **shape, num_key_value_heads=2, logits_scaling=4.0)
    assert not any(is_plain(AutoModelForCausalLM.from_config(config)) for config in (capped, scaled))
