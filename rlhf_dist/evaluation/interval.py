"""Means with honest intervals: samples of one prompt are not independent, prompts are."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class MeanInterval:
    """A mean over prompts with its 95 % interval; low and high are None with a single prompt, which says nothing about others.

    n: samples. clusters: prompts.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    clusters: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> MeanInterval:
    """The mean of the per-cluster means, with a 95 % interval from Student's t over the clusters.

    Every cluster weighs the same, whatever its number of samples. With K clusters of means x_k the interval is
    x̄ ± t(0.975, K−1) · s/√K, s² = Σ(x_k − x̄)²/(K−1). It covers the spread over prompts and, inside it, over samples.

    Args:
        values: one a sample, finite.
        clusters: the prompt of each sample.

    Raises:
        ValueError: no values, lengths that differ, a value that is not finite.
    """
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values for {len(clusters)} cluster labels")
    if not len(values):
        raise ValueError("the mean of no values")
    groups: dict[Hashable, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"a value is {value}")
        groups.setdefault(cluster, []).append(float(value))
    means = [math.fsum(group) / len(group) for group in groups.values()]
    count = len(means)
    mean = math.fsum(means) / count
    if count == 1:
        return MeanInterval(mean, None, None, len(values), 1)
    variance = math.fsum((x - mean) ** 2 for x in means) / (count - 1)
    half = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * math.sqrt(variance / count)
    return MeanInterval(mean, mean - half, mean + half, len(values), count)
