"""Learning-rate schedules as pure functions of the optimizer step."""

from __future__ import annotations

from typing import Literal


def lr_factor(step: int, total_steps: int, warmup_steps: int, schedule: Literal["linear", "constant"]) -> float:
    """What the peak learning rate is multiplied by at an optimizer step.

    Linear warm-up over `warmup_steps` steps below the peak (the first one not at 0: it would be wasted), then `constant` at the peak or
    `linear` down to 0 at `total_steps`, which is one past the last step: no step that is taken has a rate of 0.

    Args:
        step: from 0 to total_steps − 1; later ones give 0 under `linear`.
        total_steps: optimizer steps of the whole run.
        warmup_steps: steps before the peak; with as many as the run has, or more, the peak is never reached.
        schedule: what follows the warm-up.

    Raises:
        ValueError: a negative step, no steps, or an unknown schedule.
    """
    if step < 0 or total_steps < 1 or warmup_steps < 0:
        raise ValueError(f"no such point in a schedule: step {step} of {total_steps} with {warmup_steps} of warm-up")
    if schedule not in ("linear", "constant"):
        raise ValueError(f"unknown schedule {schedule!r}: linear or constant")
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    return max(0, total_steps - step) / max(1, total_steps - warmup_steps)
