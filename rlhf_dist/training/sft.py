"""Supervised fine-tuning as a stage of the supervised loop."""

from __future__ import annotations

import math

from rlhf_dist.training.supervised import Stage


def perplexity(means: dict[str, float]) -> dict[str, float]:
    """exp(mean negative log-likelihood of a trained token); infinite where that overflows is left out, for metrics are finite."""
    loss = means.get("loss")
    return {"perplexity": math.exp(loss)} if loss is not None and loss < 700 else {}


SFT = Stage(name="sft", score="eval/loss", derive=perplexity)
