"""From logits to tokens: inverse-CDF sampling with one given uniform number a row.

The log-probability returned is that of the *unfiltered* distribution log_softmax(logits / temperature): what the trainer recomputes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_dist.config.errors import UserError
from rlhf_dist.rollout.filters import PREFILTER, nucleus, ranked, wider_than

BLOCK = 256
"""Probabilities are summed in blocks of this many: a scan over the block sums and one inside a block replace a scan over the vocabulary."""


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn and where they end.

    top_k 0 and top_p 1 switch the filters off. stop_tokens and stop_strings end a completion and stay part of it.

    Raises:
        UserError: a value outside its range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _require(0 < self.temperature < float("inf"), "temperature", self.temperature, "a positive number")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or a positive number")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (off)")
        _require(all(self.stop_strings), "stop_strings", self.stop_strings, "texts that are not empty")

    @property
    def filtered(self) -> bool:
        """Whether top-k or top-p is on."""
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True)
class Draw:
    """N sampled tokens.

    tokens_N int64, -1 where the row's logits hold NaN, +inf or nothing but -inf; logprobs_N float32, nats, unfiltered;
    kept_mass_N float32, the probability that top-k and top-p left to choose from, None without filters.
    """

    tokens_N: Tensor
    logprobs_N: Tensor
    kept_mass_N: Tensor | None = None


def draw(logits_NV: Tensor, uniforms_N: Tensor, params: SamplingParams) -> Draw:
    """Samples one token a row.

    Args:
        logits_NV: any float dtype; -inf forbids a token.
        uniforms_N: float32 in (0, 1).
    """
    scaled_NV = logits_NV.float()
    if params.temperature != 1.0:
        scaled_NV = scaled_NV / params.temperature
    probs_NV = torch.softmax(scaled_NV, dim=-1)
    if params.filtered:
        tokens_N, kept_N = _choose_filtered(probs_NV, uniforms_N, params)
    else:
        tokens_N, kept_N = choose(probs_NV, uniforms_N), None
    chosen_N = _gather(probs_NV, tokens_N)
    # A single NaN or +inf makes the softmax of the whole row NaN, so the chosen entry tells about all of them.
    return Draw(torch.where(chosen_N > 0, tokens_N, -1), chosen_N.log(), kept_N)


def choose(weights_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """Inverse of the cumulative distribution: int64 [N], the first entry whose running sum exceeds u times the total.

    An entry of weight zero is never chosen. Weights need not sum to 1.
    """
    vocabulary = weights_NV.shape[1]
    if vocabulary <= 2 * BLOCK:
        return _invert(weights_NV, uniforms_N)[0]
    block_N, rest_N = _invert(_block_sums(weights_NV), uniforms_N)
    index_NB = block_N[:, None] * BLOCK + torch.arange(BLOCK, device=block_N.device)
    inside_NB = index_NB < vocabulary
    weights_NB = weights_NV.gather(1, index_NB.clamp(max=vocabulary - 1)).where(inside_NB, 0.0)
    return block_N * BLOCK + _invert(weights_NB, rest_N)[0]


def _invert(weights_NK: Tensor, uniforms_N: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen entry, and where inside it u fell, as a fraction in [0, 1)."""
    allowed_NK = weights_NK > 0
    running_NK = weights_NK.cumsum(-1)
    # The total is read at entries that may be chosen: a parallel scan need not be monotone to the last bit, and some entry must pass.
    target_N1 = uniforms_N[:, None] * running_NK.where(allowed_NK, 0.0).amax(-1, keepdim=True)
    index_N1 = ((running_NK > target_N1) & allowed_NK).to(torch.uint8).argmax(-1, keepdim=True)
    weight_N1 = weights_NK.gather(1, index_N1)
    rest_N1 = (target_N1 - running_NK.gather(1, index_N1) + weight_N1) / weight_N1
    return index_N1.squeeze(1), rest_N1.squeeze(1).clamp(0.0, 1.0 - 2.0**-24)


def _block_sums(weights_NV: Tensor) -> Tensor:
    whole = weights_NV.shape[1] // BLOCK
    sums_NK = weights_NV[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).sum(-1)
    if weights_NV.shape[1] % BLOCK:
        sums_NK = torch.cat([sums_NK, weights_NV[:, whole * BLOCK :].sum(-1, keepdim=True)], dim=1)
    return sums_NK


def _choose_filtered(probs_NV: Tensor, uniforms_N: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Tokens and the kept mass, [N] each. Top-p looks at what top-k left."""
    limit = min(params.top_k or probs_NV.shape[1], probs_NV.shape[1])
    if params.top_k or params.top_p == 1 or limit <= PREFILTER:
        candidates_NK, index_NK = ranked(probs_NV, limit)
        return _choose_ranked(candidates_NK, index_NK, candidates_NK.sum(-1, keepdim=True), uniforms_N, params)
    total_N1 = probs_NV.sum(-1, keepdim=True)
    candidates_NK, index_NK = ranked(probs_NV, PREFILTER)
    tokens_N, kept_N = _choose_ranked(candidates_NK, index_NK, total_N1, uniforms_N, params)
    # Whether a row is ranked whole depends on that row alone, so a completion still does not depend on its batch.
    wide_M = wider_than(candidates_NK, params.top_p, total_N1).nonzero()[:, 0]
    if len(wide_M):
        candidates_MV, index_MV = ranked(probs_NV[wide_M], limit)
        tokens_N[wide_M], kept_N[wide_M] = _choose_ranked(candidates_MV, index_MV, total_N1[wide_M], uniforms_N[wide_M], params)
    return tokens_N, kept_N


def _choose_ranked(
    sorted_NK: Tensor, index_NK: Tensor, total_N1: Tensor, uniforms_N: Tensor, params: SamplingParams
) -> tuple[Tensor, Tensor]:
    if params.top_p < 1:
        sorted_NK = nucleus(sorted_NK, params.top_p, total_N1)
    return _gather(index_NK, choose(sorted_NK, uniforms_N)), sorted_NK.sum(-1)


def _gather(values_NK: Tensor, index_N: Tensor) -> Tensor:
    return values_NK.gather(1, index_N[:, None]).squeeze(1)


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value!r}", where=f"rollout.{name}", fix=f"set it to {wanted}")
