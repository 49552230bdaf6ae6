"""Does this model, decoded row by row through slots, agree with its own plain forward? Asked once of every engine.

The Hugging Face interface does not say how a model uses its cache, its mask and its positions. A model that ignores one of them would
sample from wrong distributions without any error.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.config.errors import UserError
from rlhf_dist.rollout.decoder import SlotDecoder
from rlhf_dist.rollout.forward import Forward
from rlhf_dist.rollout.graphs import StepGraphs
from rlhf_dist.rollout.traits import ANOTHER_MODEL, ModelTraits

PROMPTS, STEPS = (7, 2, 4), 3
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_TOLERANCE = 0.25


def check_decoding(model: nn.Module, traits: ModelTraits, forward: Forward | None = None) -> None:
    """Compares logits on three made-up rows of different lengths. Call inside `traits.decoding`.

    Args:
        forward: what decodes; by default the model as it is.

    Raises:
        UserError: they differ by more than rounding explains.
    """
    gap, tolerance = decoding_gap(model, traits, forward), _tolerance(model)
    # Logits that are not finite are the sampler's to report, with the row that has them.
    if gap > tolerance:
        raise UserError(
            f"{traits.name} decoded through the slot cache differs from its own forward (relative gap {gap:.2g}, allowed {tolerance:.2g})",
            where="policy.model",
            fix=ANOTHER_MODEL,
        )


def graphs_hold(model: nn.Module, traits: ModelTraits, graphs: StepGraphs | None) -> bool:
    """Whether steps that `graphs` records and replays agree with the model's forward too. Call inside `traits.decoding`.

    Where they cannot be recorded (the model waits for a number on the host) or differ (it reads something that does not lie in a fixed
    place), a warning says so, and the model is to be decoded without.
    """
    if graphs is None:
        return False
    try:
        gap = decoding_gap(model, traits, graphs=graphs)
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
    else:
        if not gap > _tolerance(model):
            return True
        why = f"replayed steps differ from its forward (relative gap {gap:.2g})"
    warnings.warn(f"{traits.name} is sampled without CUDA graphs, which takes longer: {why}", stacklevel=2)
    return False


def decoding_gap(model: nn.Module, traits: ModelTraits, forward: Forward | None = None, graphs: StepGraphs | None = None) -> float:
    """Norm of the difference between decoded and plain logits, relative to the spread of the plain ones over the vocabulary."""
    rows = [_tokens(seed, length + STEPS, model) for seed, length in enumerate(PROMPTS)]
    plain = torch.stack([_plain(model, row, length) for row, length in zip(rows, PROMPTS, strict=True)])
    decoder = SlotDecoder(model, traits, len(rows), max(map(len, rows)), forward=forward, graphs=graphs)
    decoder.admit([row[:length] for row, length in zip(rows, PROMPTS, strict=True)], [0] * len(rows))
    decoded = []
    for step in range(STEPS):
        decoded.append(decoder.step().to(torch.float32, copy=True))
        decoder.feed(torch.tensor([row[length + step] for row, length in zip(rows, PROMPTS, strict=True)], device=plain.device))
    spread = plain - plain.mean(-1, keepdim=True)
    return float((torch.stack(decoded, 1) - plain).norm() / spread.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _tolerance(model: nn.Module) -> float:
    return TOLERANCE.get(next(model.parameters()).dtype, HALF_TOLERANCE)


def _plain(model: nn.Module, row: tuple[int, ...], length: int) -> Tensor:
    """Logits [STEPS, V] for the tokens after the prompt, from one forward without cache."""
    tokens = torch.tensor([row[:-1]], device=next(model.parameters()).device)
    output: Any = model(input_ids=tokens, use_cache=False)
    logits: Tensor = output.logits
    return logits[0, length - 1 :].float()


def _tokens(seed: int, length: int, model: nn.Module) -> tuple[int, ...]:
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    return tuple((31 * seed + 17 * i * i + 5) % vocabulary for i in range(length))
