"""Running normalisation of one reward: moments over every sample of the run so far."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, TypedDict

from rlhf_dist.contracts.moments import Moments, merged_moments

SMALLEST_RELATIVE_SPREAD = 1e-6
"""A standard deviation below this share of the mean is rounding, not spread."""


class NormaliserState(TypedDict):
    """The running moments, ready for JSON (whose floats keep every bit)."""

    count: int
    mean: float
    m2: float


class RunningNormaliser:
    """Scales (x / σ) or standardises ((x − μ) / σ) by the moments of all samples seen, then clips to ± `clip` (NUMERICS §1).

    As long as the samples show no spread (fewer than two, or all alike) σ counts as 1: a constant reward is never blown up.

    Args:
        mode: `none` leaves the reward as it is (the clip still holds).
        clip: bound of the result's magnitude; None: unbounded.
    """

    def __init__(self, mode: Literal["none", "scale", "standardise"], clip: float | None = None) -> None:
        self.mode = mode
        self.clip = clip
        self.moments = Moments()

    def update(self, values: Iterable[float]) -> None:
        """Takes in a batch of raw rewards, of all ranks."""
        self.moments = self.moments.merge(merged_moments(Moments(1, float(value), 0.0) for value in values))

    def __call__(self, value: float) -> float:
        """One reward, normalised."""
        if self.mode != "none":
            centre = self.moments.mean if self.mode == "standardise" else 0.0
            value = (value - centre) / self._spread()
        return value if self.clip is None else min(self.clip, max(-self.clip, value))

    def state_dict(self) -> NormaliserState:
        """The running moments."""
        return {"count": self.moments.count, "mean": self.moments.mean, "m2": self.moments.m2}

    def load_state_dict(self, state: NormaliserState) -> None:
        """Restores what `state_dict` gave."""
        self.moments = Moments(state["count"], state["mean"], state["m2"])

    def _spread(self) -> float:
        if self.moments.count < 2:
            return 1.0
        spread = math.sqrt(self.moments.variance)
        return spread if spread > SMALLEST_RELATIVE_SPREAD * abs(self.moments.mean) else 1.0
