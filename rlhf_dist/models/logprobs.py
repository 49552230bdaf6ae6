"""Log-probabilities and entropy from logits, in fp32, a chunk of tokens at a time, forward and backward (NUMERICS §1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = {"cpu": 2 * 2**20}
"""fp32 logits of one chunk: on a CPU they stay in the cache for the five passes that are made over them."""
LARGE_CHUNK_BYTES = 128 * 2**20


@dataclass(frozen=True)
class HeadOptions:
    """temperature τ; whether the entropy carries a gradient (needed only for an entropy bonus).

    chunk_tokens: tokens in one fp32 chunk; None: as the device likes it.
    logits_bytes: logits that would be larger than this in fp32 are never made whole (`models.head`).
    """

    temperature: float = 1.0
    entropy_grad: bool = False
    chunk_tokens: int | None = None
    logits_bytes: int = 256 * 2**20


def logprobs_and_entropy(logits_BTV: Tensor, tokens_BT: Tensor, options: HeadOptions) -> tuple[Tensor, Tensor]:
    """log_softmax(logits / τ) at the tokens, and the entropy over the whole vocabulary, both float32 [B, T] in nats.

    An fp32 copy of the logits never exists for more than one chunk of tokens at once; the backward pass computes the softmax again,
    from the logits and two numbers a token.
    """
    flat_NV = logits_BTV.reshape(-1, logits_BTV.shape[-1])
    size = options.chunk_tokens or _chunk_tokens(flat_NV)
    logprobs_N, entropy_N = _TokenLogprobs.apply(flat_NV, tokens_BT.reshape(-1), options.temperature, size)  # type: ignore[no-untyped-call]
    entropy_N = entropy_N if options.entropy_grad else entropy_N.detach()
    return logprobs_N.view(tokens_BT.shape), entropy_N.view(tokens_BT.shape)


def _chunk_tokens(logits_NV: Tensor) -> int:
    limit = CHUNK_BYTES.get(logits_NV.device.type, LARGE_CHUNK_BYTES)
    return max(1, limit // (4 * max(1, logits_NV.shape[1])))


class _TokenLogprobs(torch.autograd.Function):
    """Keeps the logits as they came, their maximum m and S = Σ exp(l − m)."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, tokens_N: Tensor, temperature: float, size: int) -> tuple[Tensor, Tensor]:
        logprobs_N, entropy_N, most_N, mass_N = (logits_NV.new_empty(len(logits_NV), dtype=torch.float32) for _ in range(4))
        for rows in _chunks(len(logits_NV), size):
            scaled_NV = _scaled(logits_NV[rows], temperature)
            most_N[rows] = scaled_NV.amax(1)
            shifted_NV = scaled_NV - most_N[rows, None]
            chosen_N = shifted_NV.gather(1, tokens_N[rows, None]).squeeze(1)
            terms_NV = shifted_NV.exp()
            mass_N[rows] = terms_NV.sum(1)
            log_mass_N = mass_N[rows].log()
            logprobs_N[rows] = chosen_N - log_mass_N
            entropy_N[rows] = log_mass_N - terms_NV.mul_(_finite(shifted_NV)).sum(1) / mass_N[rows]
        ctx.save_for_backward(logits_NV, tokens_N, most_N, mass_N, entropy_N)
        ctx.temperature, ctx.size = temperature, size
        ctx.set_materialize_grads(False)  # most losses leave the entropy alone
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob_N: Tensor | None, grad_entropy_N: Tensor | None) -> Any:
        logits_NV, tokens_N, most_N, mass_N, entropy_N = ctx.saved_tensors
        grad_logprob_N = torch.zeros_like(mass_N) if grad_logprob_N is None else grad_logprob_N
        gradient_NV = torch.empty_like(logits_NV)
        for rows in _chunks(len(logits_NV), ctx.size):
            shifted_NV = _scaled(logits_NV[rows], ctx.temperature) - most_N[rows, None]
            weight_N1 = grad_logprob_N[rows, None] / -mass_N[rows, None]
            if grad_entropy_N is None:
                part_NV = shifted_NV.exp_().mul_(weight_N1)
            else:  # ∂H/∂l = −p (log p + H)
                terms_NV = shifted_NV.exp()
                excess_NV = _finite(shifted_NV) + (entropy_N[rows] - mass_N[rows].log())[:, None]
                part_NV = terms_NV * (weight_N1 - excess_NV * (grad_entropy_N[rows] / mass_N[rows])[:, None])
            part_NV.scatter_add_(1, tokens_N[rows, None], grad_logprob_N[rows, None])
            gradient_NV[rows] = part_NV if ctx.temperature == 1.0 else part_NV.div_(ctx.temperature)
        return gradient_NV, None, None, None


def _scaled(logits_NV: Tensor, temperature: float) -> Tensor:
    return logits_NV.float() if temperature == 1.0 else logits_NV.float() / temperature


def _finite(shifted_NV: Tensor) -> Tensor:
    """A forbidden token's −∞ as a finite number: its probability is 0, and −∞ · 0 is not."""
    return shifted_NV.clamp_(min=torch.finfo(torch.float32).min)


def _chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
