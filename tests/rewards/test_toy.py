"""The reward is the arithmetic it says it is, and cheap tricks do not pay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.contracts.reward import checked_result
from rlhf_dist.rewards.toy import KIND, UNKIND, kindness

BEST = " Ben was kind and shared his soup. They were good friends and loved the day."


def score(completion: str, hero: str | None = "Ben") -> float:
    return kindness(["Ben saw a dog."], [completion], hero=[hero])[0]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (BEST, 1.0),
        ("", 0.0),
        (" ...", 0.0),
        (" Ben sat under a tree.", 0.3),
        (" He sat under a tree.", 0.15),
        (" He sat under a tree", 0.0),
        (" Ben smiled at the dog.", 0.3 + 0.7 / 4),
        (" ben SMILED at the dog.", 0.3 + 0.7 / 4),
        (" Ben smiled and hugged the happy dog.", 0.3 + 0.7 / 2),  # two a sentence
        (" Ben smiled. They were happy there.", 0.3 + 0.7 / 4),  # a sentence has four words
        (" Ben smiled at him. Then she smiled at her.", 0.3 + 0.7 / 4),  # each word once
        (" Ben was mean to it.", 0.3 - 0.15),
        (" Ben was sad, alone and afraid.", 0.0),
        (" Benny sat under a tree.", 0.15),  # the hero is a whole word
    ],
)
def test_by_hand(completion: str, expected: float) -> None:
    assert score(completion) == pytest.approx(expected)


def test_without_a_hero_the_other_parts_count_in_full() -> None:
    assert score(BEST, None) == pytest.approx(1.0)
    assert kindness(["p"], [" She sat under a tree."]) == [pytest.approx(0.15 / 0.85)]
    assert score(" She sat under a tree.", None) == pytest.approx(0.15 / 0.85)


@pytest.mark.parametrize(
    "trick",
    [
        " happy" * 30,
        " Ben" + " happy" * 30 + ".",
        " Happy. Kind. Warm. Glad. Ben.",
        " Ben happy kind warm glad loved friends gentle safe shared.",
        " Ben was happy." * 8,
        BEST * 4,
    ],
)
def test_tricks_earn_less_than_a_story(trick: str) -> None:
    assert score(trick) < 0.7


def test_repetition_costs_its_share() -> None:
    assert score(BEST * 2) == pytest.approx(15 / 28, abs=0.04)


@given(st.lists(st.sampled_from(["ben", "dog", ".", ",", "the", *sorted(KIND), *sorted(UNKIND)]), max_size=40))
def test_between_0_and_1_and_fit_for_the_contract(words: list[str]) -> None:
    values = kindness(["p"], [" ".join(words)], hero=["Ben"], other=[1])
    assert 0 <= values[0] <= 1.0000001
    assert checked_result("kindness", values, 1, "test").values == tuple(values)


def test_rows_are_judged_one_by_one() -> None:
    texts = [BEST, " Ben sat under a tree.", "", " He was sad."]
    together = kindness(["p"] * 4, texts, hero=["Ben", "Ben", None, "Mia"])
    assert together == [kindness(["p"], [t], hero=[h])[0] for t, h in zip(texts, ["Ben", "Ben", None, "Mia"], strict=True)]
