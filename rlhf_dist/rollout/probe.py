"""Does this model, decoded row by row through slots, agree with its own plain forward? Asked once of every engine.

The Hugging Face interface does not say how a model uses its cache, its mask and its positions. A model that ignores one of them would
sample from wrong distributions without any error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.config.errors import UserError
from rlhf_dist.rollout.decoder import SlotDecoder
from rlhf_dist.rollout.traits import ANOTHER_MODEL, ModelTraits

PROMPTS, STEPS = (7, 2, 4), 3
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_TOLERANCE = 0.25


def check_decoding(model: nn.Module, traits: ModelTraits) -> None:
    """Compares logits on three made-up rows of different lengths. Call inside `traits.decoding`.

    Raises:
        UserError: they differ by more than rounding explains.
    """
    gap, tolerance = decoding_gap(model, traits), TOLERANCE.get(next(model.parameters()).dtype, HALF_TOLERANCE)
    # Logits that are not finite are the sampler's to report, with the row that has them.
    if gap > tolerance:
        raise UserError(
            f"{traits.name} decoded through the slot cache differs from its own forward (relative gap {gap:.2g}, allowed {tolerance:.2g})",
            where="policy.model",
            fix=ANOTHER_MODEL,
        )


def decoding_gap(model: nn.Module, traits: ModelTraits) -> float:
    """Norm of the difference between decoded and plain logits, relative to the spread of the plain ones over the vocabulary."""
    rows = [_tokens(seed, length + STEPS, model) for seed, length in enumerate(PROMPTS)]
    plain = torch.stack([_plain(model, row, length) for row, length in zip(rows, PROMPTS, strict=True)])
    decoder = SlotDecoder(model, traits, len(rows), max(map(len, rows)))
    decoder.admit([row[:length] for row, length in zip(rows, PROMPTS, strict=True)], [0] * len(rows))
    decoded = []
    for step in range(STEPS):
        decoded.append(decoder.step().float())
        decoder.feed(torch.tensor([row[length + step] for row, length in zip(rows, PROMPTS, strict=True)], device=plain.device))
    spread = plain - plain.mean(-1, keepdim=True)
    return float((torch.stack(decoded, 1) - plain).norm() / spread.norm().clamp_min(torch.finfo(torch.float32).tiny))


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
