from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_dist.data.answers import AnswersRow
from rlhf_dist.data.token_rows import TokenRow
from rlhf_dist.evaluation.judged import JudgedPair, PairColumns, agreement, counted, in_words, judged_pairs


def answer(prompt: int, length: int) -> TokenRow:
    return TokenRow(np.arange(prompt + length, dtype=np.int32), np.arange(prompt + length) >= prompt, token_weight=3.0)


def test_a_ranking_gives_all_its_pairs_with_the_lengths_of_the_answers_alone() -> None:
    row = AnswersRow((answer(4, 1), answer(4, 2), answer(4, 3)), prompt=7, source="s")
    assert judged_pairs(row, [0.3, 0.2, 0.1]) == [
        JudgedPair(0.3, 0.2, 1, 2, "s", None, 7),
        JudgedPair(0.3, 0.1, 1, 3, "s", None, 7),
        JudgedPair(0.2, 0.1, 2, 3, "s", None, 7),
    ]
    with pytest.raises(ValueError, match="zip"):
        judged_pairs(row, [0.3, 0.2])


def test_a_pair_keeps_its_margin_and_its_label() -> None:
    row = AnswersRow((answer(2, 5), answer(2, 6)), 1, "s", margin=1.5, label_probability=0.8)
    assert judged_pairs(row, [1.0, 2.0]) == [JudgedPair(1.0, 2.0, 5, 6, "s", 1.5, 1, 0.8)]


def test_agreement_counts_pairs_in_order_and_equal_scores_half() -> None:
    assert agreement([3.0, 2.0, 1.0]) == 1
    assert agreement([1.0, 2.0, 3.0]) == 0
    assert agreement([2.0, 3.0, 2.0]) == pytest.approx((0 + 0.5 + 1) / 3)


def test_columns_turn_labels_under_one_half_round() -> None:
    columns = PairColumns.of([JudgedPair(1.0, 2.0, 5, 6, "s", None, 0, 0.25), JudgedPair(3.0, 4.0, 7, 8, "t", 0.5, 1)])
    assert columns.better_N.tolist() == [2.0, 3.0]
    assert columns.better_tokens_N.tolist() == [6, 7]
    assert columns.probability_N.tolist() == [0.75, 1.0]
    assert np.isnan(columns.margin_N[0]) and columns.margin_N[1] == 0.5
    assert columns.select(np.array([False, True])).sources == ("t",)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_named_by_number(score: float) -> None:
    good = JudgedPair(1.0, 0.0, 1, 1, "s", None, 0)
    with pytest.raises(ValueError, match=r"^3 of 6 scores"):
        PairColumns.of([good, JudgedPair(score, 0.0, 1, 1, "s", None, 1), JudgedPair(score, score, 1, 1, "s", None, 2)])


def test_a_label_outside_0_and_1_is_refused() -> None:
    with pytest.raises(ValueError, match="label probability"):
        PairColumns.of([JudgedPair(1.0, 0.0, 1, 1, "s", None, 0, 1.2)])


def test_counts_in_words() -> None:
    fates = {"dropped: longer than data.max_tokens": 1200, "cut: prompts shortened": 1, "dropped: odd": 2}
    assert in_words(fates) == "dropped: 1,200 longer than data.max_tokens, 2 odd; cut: 1 prompts shortened"
    assert [counted(n, "tie") for n in (0, 1, 1200)] == ["0 ties", "1 tie", "1,200 ties"]
