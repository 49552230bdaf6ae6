"""The quickstart's reward: how kind a short story is, in a form that a person can check by eye and a policy cannot cheat by repetition."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

KIND = frozenset(
    {"smiled", "kind", "shared", "helped", "hugged", "happy", "friend", "friends", "loved", "love"}
    | {"laughed", "good", "warm", "thank", "gentle", "safe", "glad"}
)
UNKIND = frozenset({"shouted", "angry", "cried", "sad", "alone", "pushed", "mean", "cold", "hurt", "broke", "afraid"})

WORDS_FOR_FULL_MARKS = 4
WORDS_A_SENTENCE = 2  # a heap of kind words is not a story,
SHORTEST_SENTENCE = 4  # and neither is "Happy. Kind. Warm."
UNKIND_COST = 0.15
PARTS = {"kind": 0.7, "hero": 0.15, "ending": 0.15}


def kindness(prompts: Sequence[str], completions: Sequence[str], hero: Sequence[str | None] | None = None, **columns: Any) -> list[float]:
    """Scores each completion between 0 and 1.

    0.7 for four different kind words (at most two count in a sentence, and none in one of fewer than four words), 0.15 for naming
    the hero, 0.15 for ending with a full stop; less 0.15 for each unkind word; times the share of different ones among its word triples.

    Args:
        prompts, completions: text, one a row.
        hero: the name to mention, one a row; where it is None (or no such column exists) the other parts count in full.
    """
    heroes = hero if hero is not None else [None] * len(completions)
    return [_score(completion, name) for completion, name in zip(completions, heroes, strict=True)]


def _score(completion: str, hero: str | None) -> float:
    words = re.findall(r"[a-z']+", completion.lower())
    if not words:
        return 0.0
    earned = PARTS["kind"] * _kind_share(completion) + PARTS["ending"] * completion.rstrip().endswith(".")
    if hero is None:
        earned /= 1 - PARTS["hero"]
    else:
        earned += PARTS["hero"] * (hero.lower() in words)
    earned -= UNKIND_COST * sum(word in UNKIND for word in words)
    return max(0.0, earned) * _fresh_share(words)


def _kind_share(completion: str) -> float:
    seen: set[str] = set()
    for sentence in completion.lower().split("."):
        words = re.findall(r"[a-z']+", sentence)
        if len(words) >= SHORTEST_SENTENCE:
            seen.update([word for word in dict.fromkeys(words) if word in KIND - seen][:WORDS_A_SENTENCE])
    return min(1.0, len(seen) / WORDS_FOR_FULL_MARKS)


def _fresh_share(words: list[str]) -> float:
    """1 without repetition; about 1/n when the same words come n times. Threes, because "the bird" may well come twice."""
    threes = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(threes)) / len(threes) if threes else 1.0
