"""Length control against reward hacking: what a completion pays for not stopping, running long, or being too short.

Lengths are response tokens, the stop token included.
"""

from __future__ import annotations

from typing import Literal

from rlhf_dist.contracts.experience import StopReason


def missing_stop_score(score: float, stop_reason: int, rule: Literal["none", "subtract", "replace"], value: float) -> float:
    """The score after the missing-stop rule (NUMERICS §1). It looks at why the completion ended: every configured stop counts.

    Args:
        score: the mixed score.
        stop_reason: a `StopReason`; only LENGTH is a missing stop.
        rule: leave the score, subtract `value`, or put `value` in its place.
    """
    if rule == "none" or stop_reason != StopReason.LENGTH:
        return score
    return score - value if rule == "subtract" else value


def soft_overlong_penalty(length: int, max_new_tokens: int, buffer: int, penalty: float) -> float:
    """What a long completion pays, ≥ 0: nothing up to `max_new_tokens − buffer`, then linearly more, `penalty` at `max_new_tokens`.

    The soft over-long punishment of DAPO (arXiv 2503.14476, eq. 13). A buffer of 0 switches it off.
    """
    if buffer == 0:
        return 0.0
    into_buffer = length - (max_new_tokens - buffer)
    return penalty * min(1.0, max(0.0, into_buffer / buffer))


def minimum_length_penalty(length: int, tokens: int, penalty: float) -> float:
    """What a completion shorter than `tokens` pays, ≥ 0; 0 tokens switch it off."""
    return penalty if length < tokens else 0.0
