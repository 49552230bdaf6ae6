"""Log-probs and entropy straight from hidden states: the head's logits never stand in memory at once.

A vocabulary of 150,000 makes 600 KB of fp32 logits a token, and their gradient as much again. Here the head is applied block by block of
the vocabulary with a running log-sum-exp, and again in the backward pass: the peak depends on the block, not on the vocabulary. It costs
one more product with the head's weight, so it is used where the logits would be large.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TOKENS, COLUMNS = 1024, 8192
"""Of one block: 32 MiB of fp32 logits."""


def linear_logprobs(hidden_ND: Tensor, head: nn.Linear, tokens_N: Tensor, temperature: float, entropy_grad: bool) -> tuple[Tensor, Tensor]:
    """log_softmax(head(hidden) / τ) at the tokens, and the entropy over the vocabulary, both float32 [N] in nats (NUMERICS §1).

    Args:
        hidden_ND: inputs of the head. tokens_N: whose log-probs are wanted. entropy_grad: whether the entropy carries a gradient.
    """
    logprobs_N, entropy_N = _LinearLogprobs.apply(hidden_ND, head.weight, head.bias, tokens_N, temperature)  # type: ignore[no-untyped-call]
    return logprobs_N, entropy_N if entropy_grad else entropy_N.detach()


def is_plain(model: Any) -> bool:
    """Whether a model's logits are what its head gives, unscaled and uncapped, and the head a linear layer: tried on two tokens."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    gather_on_gpu(model)
    given: list[Tensor] = []
    handle = head.register_forward_hook(lambda _, __, output: given.append(output))
    try:
        with torch.no_grad():
            ids = torch.tensor([[1, 0]], device=head.weight.device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        handle.remove()
    return len(given) == 1 and given[0].shape == logits.shape and torch.equal(given[0], logits)


def wants_one_row(model: Any) -> bool:
    """Whether the model's attention kernel is a flash kernel, which tells packed sequences apart in a single row only."""
    return "flash" in model.config._attn_implementation


def gather_on_gpu(model: nn.Module) -> None:
    """Moves a model to the GPU that its 4-bit layers are on already, or that its kernels need; others stay until an engine takes them."""
    devices = {parameter.device for parameter in model.parameters()}
    if wants_one_row(model):
        model.to("cuda")  # its kernels run nowhere else
    elif len(devices) > 1:
        model.to(next(device for device in devices if device.type != "cpu"))


@contextmanager
def logprobs_in_head(model: Any, slots_N: Tensor, tokens_N: Tensor, temperature: float, entropy_grad: bool) -> Iterator[None]:
    """Within it the model's `logits` are [1, N, 2]: log-prob and entropy of the tokens that these slots of the flattened grid predict.

    Inside the head, because ZeRO 3 has its weight whole there and nowhere else.
    """
    head = model.get_output_embeddings()

    def forward(hidden: Tensor) -> Tensor:
        picked_ND = hidden.flatten(0, 1).index_select(0, slots_N)
        return torch.stack(linear_logprobs(picked_ND, head, tokens_N, temperature, entropy_grad), dim=-1).unsqueeze(0)

    head.__dict__["forward"] = forward
    try:
        yield
    finally:
        head.__dict__.pop("forward")


class _LinearLogprobs(torch.autograd.Function):
    """Keeps hidden states and two numbers a token for the backward pass; sums of gradients are fp32 whatever the precision."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, tokens_N: Tensor, temperature: float) -> Any:
        parts = [_stream(hidden_ND[rows], weight_VD, bias_V, tokens_N[rows], temperature) for rows in _slices(len(hidden_ND), TOKENS)]
        empty = hidden_ND.new_zeros(0, dtype=torch.float32)
        lse_N, entropy_N, chosen_N = (torch.cat([empty, *column]) for column in zip(*parts, strict=True)) if parts else (empty,) * 3
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, tokens_N, lse_N, entropy_N)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # most losses leave the entropy alone
        return chosen_N - lse_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_logprob_N: Tensor | None, grad_entropy_N: Tensor | None) -> Any:
        hidden_ND, weight_VD, bias_V, tokens_N, lse_N, entropy_N = ctx.saved_tensors
        grad_logprob_N = torch.zeros_like(lse_N) if grad_logprob_N is None else grad_logprob_N
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden_ND, dtype=torch.float32) if wants_hidden else None
        grad_weight = torch.empty_like(weight_VD) if wants_weight else None
        grad_bias = torch.empty_like(bias_V) if wants_bias else None
        for columns in _slices(len(weight_VD), COLUMNS):
            block_CD = weight_VD[columns]
            sum_CD = torch.zeros(block_CD.shape if wants_weight else (0, 0), dtype=torch.float32, device=block_CD.device)
            sum_C = torch.zeros(len(block_CD), dtype=torch.float32, device=block_CD.device)
            for rows in _slices(len(hidden_ND), TOKENS):
                logits_NC = _logits(hidden_ND[rows], block_CD, None if bias_V is None else bias_V[columns], ctx.temperature)
                grad_NC = _gradient(logits_NC, tokens_N[rows] - columns.start, lse_N[rows], grad_logprob_N[rows])
                if grad_entropy_N is not None:
                    log_p_NC = (logits_NC - lse_N[rows, None]).clamp(min=torch.finfo(torch.float32).min)  # −inf · 0 is not 0
                    grad_NC -= grad_entropy_N[rows, None] * log_p_NC.exp() * (log_p_NC + entropy_N[rows, None])
                grad_NC = (grad_NC / ctx.temperature).to(hidden_ND.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] += grad_NC @ block_CD
                if wants_weight:
                    sum_CD += grad_NC.T @ hidden_ND[rows]
                sum_C += grad_NC.sum(0)
            if grad_weight is not None:
                grad_weight[columns] = sum_CD.to(grad_weight.dtype)
            if grad_bias is not None:
                grad_bias[columns] = sum_C.to(grad_bias.dtype)
        return None if grad_hidden is None else grad_hidden.to(hidden_ND.dtype), grad_weight, grad_bias, None, None


def _stream(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, tokens_N: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """Log-sum-exp, entropy and the tokens' logits, float32 [N], with a running maximum m, Σ exp(l − m) and Σ exp(l − m)·l."""
    most_N = torch.full((len(hidden_ND),), -torch.inf, device=hidden_ND.device)
    mass_N, weighted_N, chosen_N = (torch.zeros_like(most_N) for _ in range(3))
    for columns in _slices(len(weight_VD), COLUMNS):
        logits_NC = _logits(hidden_ND, weight_VD[columns], None if bias_V is None else bias_V[columns], temperature)
        before_N, most_N = most_N, torch.maximum(most_N, logits_NC.amax(1))
        fade_N = torch.where(before_N == most_N, 1.0, (before_N - most_N).exp())
        terms_NC = (logits_NC - most_N[:, None]).exp()
        mass_N = mass_N * fade_N + terms_NC.sum(1)
        weighted_N = weighted_N * fade_N + (terms_NC * torch.where(terms_NC > 0, logits_NC, 0.0)).sum(1)
        local_N = tokens_N - columns.start
        here_N = (local_N >= 0) & (local_N < logits_NC.shape[1])
        found_N = logits_NC.gather(1, local_N.clamp(0, logits_NC.shape[1] - 1).unsqueeze(1)).squeeze(1)
        chosen_N = torch.where(here_N, found_N, chosen_N)
    lse_N = most_N + mass_N.log()
    return lse_N, lse_N - weighted_N / mass_N, chosen_N


def _gradient(logits_NC: Tensor, local_N: Tensor, lse_N: Tensor, grad_N: Tensor) -> Tensor:
    """(1[token] − p) · gradient of the log-prob, in the columns of a block."""
    gradient_NC = -(logits_NC - lse_N[:, None]).exp() * grad_N[:, None]
    here_N = (local_N >= 0) & (local_N < logits_NC.shape[1])
    added_N = torch.where(here_N, grad_N, 0.0)
    return gradient_NC.scatter_add(1, local_N.clamp(0, logits_NC.shape[1] - 1).unsqueeze(1), added_N.unsqueeze(1))


def _logits(hidden_ND: Tensor, weight_CD: Tensor, bias_C: Tensor | None, temperature: float) -> Tensor:
    return nn.functional.linear(hidden_ND, weight_CD, bias_C).float() / temperature


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
