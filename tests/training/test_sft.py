"""Perplexity follows from the loss."""

from __future__ import annotations

import math

from rlhf_dist.training.sft import SFT, perplexity


def test_perplexity() -> None:
    assert perplexity({"loss": math.log(7.0)}) == {"perplexity": math.exp(math.log(7.0))}
    assert perplexity({"loss": 1e4}) == {} == perplexity({})


def test_the_stage_wants_a_small_loss() -> None:
    assert SFT.score == "eval/loss" and not SFT.more_is_better
