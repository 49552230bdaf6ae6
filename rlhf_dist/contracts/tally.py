"""Metrics that merge exactly: sums with weights, and maxima. No mean of means, no metric that is 0 because nothing was counted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Sums and weights by metric name, from one microbatch, rank or step."""

    sums: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: float, weight: float) -> None:
        """Adds a sum over `weight` items (tokens, sequences, steps)."""
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.weights[name] = self.weights.get(name, 0.0) + float(weight)

    def peak(self, name: str, value: float) -> None:
        """Keeps the largest value seen; a NaN stays, whatever comes before or after it."""
        current = self.maxima.get(name, float("-inf"))
        self.maxima[name] = math.nan if math.isnan(value) or math.isnan(current) else max(float(value), current)

    def merge(self, other: Tally) -> None:
        """Takes in another tally."""
        for name, total in other.sums.items():
            self.add(name, total, other.weights[name])
        for name, value in other.maxima.items():
            self.peak(name, value)

    def means(self) -> dict[str, float]:
        """Weighted means and maxima; a name that nothing was counted for is left out."""
        means = {name: total / self.weights[name] for name, total in self.sums.items() if self.weights[name] > 0}
        return means | self.maxima


def merged(tallies: Iterable[Tally]) -> Tally:
    """One tally out of many."""
    result = Tally()
    for tally in tallies:
        result.merge(tally)
    return result
