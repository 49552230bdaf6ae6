"""Comparisons that a reward model has judged: what its report is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rlhf_dist.data.answers import AnswersRow

RowFates: TypeAlias = dict[str, int]
"""Rows that were dropped or cut, by reason, such as {"dropped: longer than data.max_tokens": 31}."""


def in_words(fates: Mapping[str, int]) -> str:
    """`dropped: 31 longer than data.max_tokens, 2 empty prompt; cut: 4 …`: the rows of each fate, by reason."""
    reasons: dict[str, list[str]] = {}
    for name, count in fates.items():
        fate, _, reason = name.partition(": ")
        reasons.setdefault(fate, []).append(f"{count:,} {reason}".rstrip())
    return "; ".join(f"{fate}: {', '.join(each)}" for fate, each in reasons.items())


def counted(count: int, thing: str) -> str:
    """`1 tie`, `1,200 ties`."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


@dataclass(frozen=True)
class JudgedPair:
    """Two answers to one prompt with the scores that a reward model gave them.

    better, worse: score r of the answer that was said to be the better, and of the other.
    better_tokens, worse_tokens: lengths of the answers.
    source: as `data.layouts.Origin.source`. margin: how much better it was said to be, None where the data do not tell.
    prompt: number of the prompt: pairs of one prompt (rankings) are not independent.
    probability: that `better` is better (soft labels), None for a hard label; 0.5 is a tie, less than 0.5 says that `worse` is the better.
    """

    better: float
    worse: float
    better_tokens: int
    worse_tokens: int
    source: str
    margin: float | None
    prompt: int
    probability: float | None = None

    def swapped(self) -> JudgedPair:
        """The same comparison, told the other way round."""
        return replace(
            self,
            better=self.worse,
            worse=self.better,
            better_tokens=self.worse_tokens,
            worse_tokens=self.better_tokens,
            probability=0.0 if self.probability is None else 1.0 - self.probability,
        )


def agreement(scores: Sequence[float]) -> float:
    """The share of the C(K, 2) pairs of K answers, best first, whose better answer has the higher score; equal scores count half."""
    pairs = list(combinations(scores, 2))
    return sum((better > worse) + (better == worse) / 2 for better, worse in pairs) / len(pairs)


def judged_pairs(row: AnswersRow, scores: Sequence[float]) -> list[JudgedPair]:
    """The C(K, 2) pairs of the K answers to a prompt.

    Args:
        row: answers, best first; their lengths count the tokens of the answer alone, the stop token included.
        scores: one an answer.

    Raises:
        ValueError: another number of scores than of answers.
    """
    answers = list(zip(scores, (int(answer.trained.sum()) for answer in row.answers), strict=True))
    return [
        JudgedPair(better, worse, length, other, row.source, row.margin, row.prompt, row.label_probability)
        for (better, length), (worse, other) in combinations(answers, 2)
    ]


@dataclass(frozen=True)
class PairColumns:
    """Judged pairs as columns, each of length N, the better answer first (labels of probability under 0.5 turned round).

    probability_N: 1 for a hard label, otherwise in [0.5, 1]. margin_N: NaN where the data do not tell.
    """

    better_N: NDArray[np.float64]
    worse_N: NDArray[np.float64]
    better_tokens_N: NDArray[np.int64]
    worse_tokens_N: NDArray[np.int64]
    probability_N: NDArray[np.float64]
    margin_N: NDArray[np.float64]
    prompt_N: NDArray[np.int64]
    sources: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.better_N)

    @property
    def difference_N(self) -> NDArray[np.float64]:
        """r_better − r_worse."""
        return self.better_N - self.worse_N

    @property
    def tie_N(self) -> NDArray[np.bool_]:
        """Labels that prefer neither."""
        return self.probability_N == 0.5

    def select(self, mask_N: NDArray[np.bool_]) -> PairColumns:
        """Some of the pairs."""
        return PairColumns(
            self.better_N[mask_N],
            self.worse_N[mask_N],
            self.better_tokens_N[mask_N],
            self.worse_tokens_N[mask_N],
            self.probability_N[mask_N],
            self.margin_N[mask_N],
            self.prompt_N[mask_N],
            tuple(source for source, kept in zip(self.sources, mask_N, strict=True) if kept),
        )

    @classmethod
    def of(cls, pairs: Sequence[JudgedPair]) -> PairColumns:
        """Checks and turns.

        Raises:
            ValueError: scores that are not finite (named by number), or a label probability outside [0, 1].
        """
        faulty = sum(not math.isfinite(score) for pair in pairs for score in (pair.better, pair.worse))
        if faulty:
            raise ValueError(f"{faulty} of {2 * len(pairs)} scores are not finite numbers")
        if any(pair.probability is not None and not 0 <= pair.probability <= 1 for pair in pairs):
            raise ValueError("a label probability is outside [0, 1]")
        turned = [pair.swapped() if pair.probability is not None and pair.probability < 0.5 else pair for pair in pairs]
        return cls(
            np.array([pair.better for pair in turned], float),
            np.array([pair.worse for pair in turned], float),
            np.array([pair.better_tokens for pair in turned], np.int64),
            np.array([pair.worse_tokens for pair in turned], np.int64),
            np.array([1.0 if pair.probability is None else pair.probability for pair in turned], float),
            np.array([math.nan if pair.margin is None else pair.margin for pair in turned], float),
            np.array([pair.prompt for pair in turned], np.int64),
            tuple(pair.source for pair in turned),
        )
