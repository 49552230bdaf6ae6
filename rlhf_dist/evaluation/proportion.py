"""Shares with honest intervals: within 0 and 1, of some width where all agree, and clustered: prompts are the sample."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.special import stdtrit

from rlhf_dist.evaluation.interval import CONFIDENCE, MeanInterval, clustered_mean


def clustered_share(values: Sequence[float], clusters: Sequence[Hashable]) -> MeanInterval:
    """The mean of the per-cluster means of values in [0, 1], with a 95 % Wilson interval at the effective number of values.

    Student's interval of `clustered_mean` has no width where every value is 1, and leaves [0, 1] near its ends. Here the standard error
    over clusters only says how many independent values the sample is worth, n* = p (1 − p) / se² (no more than there are), and
    Wilson's interval (1927) is taken at n* with the t quantile of K − 1 degrees of freedom (as Korn and Graubard 1998 do for surveys).
    Where all values are 0, or all 1, the clusters say nothing about their spread, and n* is their number K.

    Args:
        values: one a sample, in [0, 1]; a half where a sample is undecided. clusters: the prompt of each sample.

    Raises:
        ValueError: no values, lengths that differ, a value outside [0, 1].
    """
    if not all(0 <= value <= 1 for value in values):
        raise ValueError("a share is made of values between 0 and 1")
    plain = clustered_mean(values, clusters)
    if plain.high is None:
        return plain
    quantile = float(stdtrit(plain.clusters - 1, (1 + CONFIDENCE) / 2))
    low, high = _wilson(plain.mean, _effective(plain, (plain.high - plain.mean) / quantile), quantile)
    return MeanInterval(plain.mean, low, high, plain.n, plain.clusters)


def paired_share_difference(one: Sequence[float], other: Sequence[float], clusters: Sequence[Hashable]) -> MeanInterval:
    """Mean of `one` − `other`, two values in [0, 1] measured on each sample, clustered, with a 95 % interval within [−1, 1].

    From the two Wilson intervals and the correlation of the two over clusters (Newcombe 1998, Statistics in Medicine 17:2635); where one
    of them does not vary, the correlation counts as 0. Student's interval over the differences has no bounds.

    Raises:
        ValueError: as `clustered_share`.
    """
    shares = [clustered_share(values, clusters) for values in (one, other)]
    mean, low, high = share_difference(shares[0], shares[1], _correlation(one, other, clusters))
    return MeanInterval(mean, low, high, shares[0].n, shares[0].clusters)


def share_difference(one: MeanInterval, other: MeanInterval, correlation: float = 0.0) -> tuple[float, float | None, float | None]:
    """`one` − `other`, and its 95 % interval (Newcombe 1998, method 10: from the two Wilson intervals).

    Low and high are None where one of the two has no interval.

    Args:
        correlation: of the two estimates; 0 for independent samples.
    """
    difference = one.mean - other.mean
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return difference, None, None
    below = _joined(one.mean - one.low, other.high - other.mean, correlation)
    above = _joined(one.high - one.mean, other.mean - other.low, correlation)
    return difference, difference - below, difference + above


def _joined(a: float, b: float, correlation: float) -> float:
    return math.sqrt(max(0.0, a * a + b * b - 2 * correlation * a * b))


def _correlation(one: Sequence[float], other: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Pearson's, of the means of the clusters; 0 where one of the two does not vary."""
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    places = np.array([numbers[cluster] for cluster in clusters])
    means = np.stack([np.bincount(places, values) for values in (one, other)]) / np.bincount(places)
    centred = means - means.mean(1, keepdims=True)
    norms = np.sqrt((centred**2).sum(1)).prod()
    return float(np.clip(centred.prod(0).sum() / norms, -1, 1)) if norms > 1e-12 else 0.0


def _effective(plain: MeanInterval, error: float) -> float:
    spread = plain.mean * (1 - plain.mean)
    if spread <= 0:
        return plain.clusters
    return plain.n if error**2 * plain.n <= spread else spread / error**2


def _wilson(share: float, count: float, quantile: float) -> tuple[float, float]:
    weight = quantile**2 / count
    centre = (share + weight / 2) / (1 + weight)
    half = quantile / (1 + weight) * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
