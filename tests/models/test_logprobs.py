"""The head against a plain log_softmax: values, gradients and entropy for any chunk size, and what never exists in fp32."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_dist.models.logprobs import HeadOptions, logprobs_and_entropy


def case(rows: int, columns: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_BTV = 3 * torch.randn(rows, columns, vocabulary, generator=generator)
    return logits_BTV.requires_grad_(), torch.randint(vocabulary, (rows, columns), generator=generator)


def plain(logits_BTV: Tensor, tokens_BT: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p_BTV = torch.log_softmax(logits_BTV.double() / temperature, -1)
    return log_p_BTV.gather(-1, tokens_BT[..., None])[..., 0], -(log_p_BTV.exp() * log_p_BTV).sum(-1)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 3),
    columns=st.integers(1, 5),
    vocabulary=st.integers(1, 9),
    chunk=st.integers(1, 20),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
)
def test_any_chunk_size_gives_the_plain_values_and_gradients(rows, columns, vocabulary, chunk, temperature) -> None:
    logits, tokens = case(rows, columns, vocabulary)
    got = logprobs_and_entropy(logits, tokens, HeadOptions(temperature, entropy_grad=True, chunk_tokens=chunk))
    want = plain(logits, tokens, temperature)
    weights = [torch.randn(rows, columns, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
    gradients = [torch.autograd.grad(sum((x * w).sum() for x, w in zip(pair, weights, strict=True)), logits)[0] for pair in (got, want)]
    for mine, plainly in (*zip(got, want, strict=True), tuple(gradients)):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), plainly.double(), rtol=1e-5, atol=1e-6)


def test_one_chunk_and_many_agree_bit_for_bit() -> None:
    logits, tokens = case(3, 7, 11)
    results = []
    for chunk in (1, 4, 1000):
        logprobs, _ = logprobs_and_entropy(logits, tokens, HeadOptions(chunk_tokens=chunk))
        results.append((logprobs.detach(), torch.autograd.grad(logprobs.sum(), logits)[0]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_entropy_carries_a_gradient_only_where_it_is_trained_on() -> None:
    logits, tokens = case(1, 3, 5)
    assert logprobs_and_entropy(logits, tokens, HeadOptions(entropy_grad=True))[1].requires_grad
    logprobs, entropy = logprobs_and_entropy(logits, tokens, HeadOptions())
    assert logprobs.requires_grad and not entropy.requires_grad
    torch.testing.assert_close(entropy.double(), plain(logits, tokens, 1.0)[1].detach(), rtol=1e-5, atol=1e-6)


def test_a_uniform_distribution_has_the_entropy_of_its_size() -> None:
    logprobs, entropy = logprobs_and_entropy(torch.zeros(1, 2, 8), torch.tensor([[0, 7]]), HeadOptions(temperature=3.0))
    assert logprobs.tolist() == [[pytest.approx(-math.log(8))] * 2]
    assert entropy.tolist() == [[pytest.approx(math.log(8))] * 2]


@pytest.mark.parametrize("chunk", [1, 64])
def test_a_forbidden_token_leaves_everything_else_finite(chunk: int) -> None:
    """Logits of −inf: the entropy is that of the others, and no gradient is NaN."""
    logits, tokens = case(2, 3, 5)
    forbidden = torch.zeros(5, dtype=torch.bool)
    forbidden[3] = True
    allowed = torch.where(tokens == 3, 1, tokens)
    logprobs, entropy = logprobs_and_entropy(
        logits.masked_fill(forbidden, -torch.inf), allowed, HeadOptions(entropy_grad=True, chunk_tokens=chunk)
    )
    gradient = torch.autograd.grad(logprobs.sum() + entropy.sum(), logits)[0]
    assert torch.isfinite(logprobs).all() and torch.isfinite(gradient).all() and not gradient[..., 3].any() and gradient.any()
    rest = logits.detach()[..., ~forbidden]
    torch.testing.assert_close(entropy.double().detach(), plain(rest, torch.zeros_like(tokens), 1.0)[1], rtol=1e-5, atol=1e-6)


def test_half_precision_logits_are_reduced_in_fp32() -> None:
    logits, tokens = case(2, 3, 50)
    half = logits.detach().bfloat16()
    logprobs, entropy = logprobs_and_entropy(half, tokens, HeadOptions())
    want = plain(half, tokens, 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), want[1], rtol=1e-5, atol=1e-5)


def test_no_response_positions_are_no_error() -> None:
    logprobs, entropy = logprobs_and_entropy(torch.zeros(2, 0, 5), torch.zeros(2, 0, dtype=torch.long), HeadOptions())
    assert logprobs.shape == entropy.shape == (2, 0)


class Largest(TorchDispatchMode):
    """Remembers the largest fp32 tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.numel = max(self.numel, tensor.numel())
        return result


def test_an_fp32_copy_exists_for_one_chunk_at_a_time_also_in_the_backward_pass() -> None:
    logits = torch.randn(4, 16, 100).bfloat16().requires_grad_()
    with Largest() as seen:
        logprobs, entropy = logprobs_and_entropy(
            logits, torch.zeros(4, 16, dtype=torch.long), HeadOptions(entropy_grad=True, chunk_tokens=8)
        )
        (logprobs.sum() + entropy.sum()).backward()
    assert seen.numel == 8 * 100
