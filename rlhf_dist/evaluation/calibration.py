"""Does a preference of 70 % come true seven times in ten? Calibration curve and expected error (Guo et al. 2017, arXiv 1706.04599)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from rlhf_dist.evaluation.interval import MeanInterval, clustered_mean
from rlhf_dist.evaluation.judged import PairColumns
from rlhf_dist.evaluation.proportion import clustered_share

BINS = 10


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs of like prediction: the mean probability that the first answer is the better, and how often it was, with its 95 % interval."""

    predicted: float
    observed: MeanInterval

    def mirrored(self) -> CalibrationBin:
        """The same pairs with their answers in the other order."""
        seen = self.observed
        low, high = (None if end is None else 1 - end for end in (seen.high, seen.low))
        return CalibrationBin(1 - self.predicted, MeanInterval(1 - seen.mean, low, high, seen.n, seen.clusters))


@dataclass(frozen=True)
class Calibration:
    """The curve, lowest predictions first; its lower half mirrors the upper.

    ece: expected calibration error, Σ n_b/N · |observed − predicted|, in [0, 1].
    ece_by_chance: what a perfectly calibrated model would show on as many independent pairs: with few pairs no curve lies on the diagonal.
    """

    ece: float
    ece_by_chance: float
    bins: tuple[CalibrationBin, ...]


def calibrate(pairs: PairColumns, bins: int = BINS) -> Calibration:
    """Bins of equal counts by the predicted probability σ(r_first − r_second).

    A pair has no first answer: each is taken in both orders, so predictions cover 0 to 1 and nothing depends on which order is drawn.
    (With the better answer always first, every observation would be 1.) The order in which the model prefers the first answer gives the
    upper half of the bins, where every pair stands once; the other order mirrors it. Soft labels count by their probability, ties and
    equal scores as a half.

    Args:
        pairs: at least one. bins: an even number; fewer where there are fewer pairs.
    """
    sign_N = np.sign(pairs.difference_N)
    predicted_N = expit(np.abs(pairs.difference_N))
    observed_N = np.select([sign_N > 0, sign_N < 0], [pairs.probability_N, 1 - pairs.probability_N], 0.5)
    order = np.argsort(predicted_N, kind="stable")
    upper, error, chance = [], 0.0, 0.0
    for rows in np.array_split(order, min(bins // 2, len(order))):
        prompts = pairs.prompt_N[rows].tolist()
        predicted = clustered_mean(predicted_N[rows].tolist(), prompts).mean
        observed = clustered_share(observed_N[rows].tolist(), prompts)
        upper.append(CalibrationBin(predicted, observed))
        share = len(rows) / len(order)
        error += share * abs(observed.mean - predicted)
        # The mean of |x| for a centred normal x is √(2/π) times its deviation.
        chance += share * math.sqrt(2 / math.pi * float((predicted_N[rows] * (1 - predicted_N[rows])).mean()) / len(rows))
    return Calibration(error, chance, (*(each.mirrored() for each in reversed(upper)), *upper))
