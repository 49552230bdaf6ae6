"""A look at a reward before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_dist.contracts.reward import Reward, RewardRequest, RewardResult

PROBE_COMPLETIONS = ("This is a probe.", "This is another, somewhat longer probe of the reward.")


def probe(reward: Reward, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> RewardResult:
    """Calls a reward on the first two real prompts with dummy completions, so that a broken one is found before training.

    Args:
        prompts: at least one; columns: the other columns of the same rows.

    Raises:
        UserError: whatever would stop the run in training: wrong length, text, NaN, a missing column, an exception.
        ValueError: no prompts.
    """
    if not prompts:
        raise ValueError("probing a reward needs at least one prompt")
    rows = min(len(prompts), len(PROBE_COMPLETIONS))
    return reward(
        RewardRequest(tuple(prompts[:rows]), PROBE_COMPLETIONS[:rows], {key: tuple(values[:rows]) for key, values in columns.items()})
    )
