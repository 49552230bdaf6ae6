"""Log-probabilities and entropy from logits, in fp32, in chunks of tokens that are recomputed in the backward pass (NUMERICS §1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class HeadOptions:
    """temperature τ; whether the entropy carries a gradient (needed only for an entropy bonus); tokens in one fp32 chunk.

    logits_bytes: logits that would be larger than this in fp32 are never made whole (`models.head`).
    """

    temperature: float = 1.0
    entropy_grad: bool = False
    chunk_tokens: int = 1024
    logits_bytes: int = 256 * 2**20


def logprobs_and_entropy(logits_BTV: Tensor, tokens_BT: Tensor, options: HeadOptions) -> tuple[Tensor, Tensor]:
    """log_softmax(logits / τ) at the tokens, and the entropy over the whole vocabulary, both float32 [B, T] in nats.

    An fp32 copy of the logits never exists for more than `chunk_tokens` tokens at once.
    """
    flat, tokens, size = logits_BTV.reshape(-1, logits_BTV.shape[-1]), tokens_BT.reshape(-1), options.chunk_tokens
    parts = [_chunk(flat[i : i + size], tokens[i : i + size], options) for i in range(0, max(len(tokens), 1), size)]
    logprobs, entropy = (torch.cat(column).view(tokens_BT.shape) for column in zip(*parts, strict=True))
    return logprobs, entropy


def _chunk(logits_NV: Tensor, tokens_N: Tensor, options: HeadOptions) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and logits_NV.requires_grad:
        return checkpoint(_logprobs_and_entropy, logits_NV, tokens_N, options, use_reentrant=False)
    return _logprobs_and_entropy(logits_NV, tokens_N, options)


def _logprobs_and_entropy(logits_NV: Tensor, tokens_N: Tensor, options: HeadOptions) -> tuple[Tensor, Tensor]:
    log_p_NV = torch.log_softmax(logits_NV.float() / options.temperature, dim=-1)
    logprobs_N = log_p_NV.gather(-1, tokens_N.unsqueeze(-1)).squeeze(-1)
    return logprobs_N, _entropy(log_p_NV if options.entropy_grad else log_p_NV.detach())


def _entropy(log_p_NV: Tensor) -> Tensor:
    safe_NV = log_p_NV.masked_fill(log_p_NV == float("-inf"), 0.0)
    return -(log_p_NV.exp() * safe_NV).sum(-1)
