"""Reward of the sentiment recipe: how cheerful a completion reads, by VADER (Hutto & Gilbert 2014). Needs `pip install vaderSentiment`."""

from __future__ import annotations

from functools import cache
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


def vader(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Compound sentiment of each completion alone, from -1 (sad) to 1 (cheerful)."""
    return [_analyzer().polarity_scores(completion)["compound"] for completion in completions]


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    """Reading the lexicon takes a moment: once a process, when first asked."""
    return SentimentIntensityAnalyzer()
