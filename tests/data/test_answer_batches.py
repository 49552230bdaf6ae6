"""Rows of answers as a batch: every text in its row, best first, ragged in tokens and in answers."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.data.answer_batches import collate_answers
from rlhf_dist.data.answers import AnswersRow
from rlhf_dist.data.token_rows import TokenRow


def row(*texts: list[int], margin: float | None = None, probability: float | None = None, weight: float = 1.0) -> AnswersRow:
    answers = tuple(TokenRow(np.array(text, np.int32), np.arange(len(text)) > 0) for text in texts)
    return AnswersRow(answers, 0, "s", margin, probability, weight)


def test_a_pair_a_soft_pair_and_a_ranking() -> None:
    batch = collate_answers(
        [row([1, 5], [1, 6, 7], margin=2.0), row([1, 8], [1, 9], probability=0.7, weight=0.5), row([1, 2, 3], [4, 5], [6, 7])]
    )
    assert batch.answers_BK.tolist() == [[0, 1, 0], [2, 3, 0], [4, 5, 6]]
    assert batch.mask_BK.tolist() == [[True, True, False], [True, True, False], [True, True, True]]
    assert batch.margin_B.tolist() == [2.0, 0.0, 0.0] and batch.weight_B.tolist() == [1.0, 0.5, 1.0]
    assert [math.isnan(p) for p in batch.probability_B.tolist()] == [True, False, True] and batch.probability_B[1] == torch.tensor(0.7)
    assert {batch.margin_B.dtype, batch.probability_B.dtype, batch.weight_B.dtype} == {torch.float32}


texts = st.lists(st.integers(1, 99), min_size=1, max_size=6)


@given(st.lists(st.lists(texts, min_size=2, max_size=4), min_size=1, max_size=5))
def test_every_answer_is_where_the_index_says(rows: list[list[list[int]]]) -> None:
    batch = collate_answers([row(*answers) for answers in rows])
    assert len(batch) == len(rows) and len(batch.tokens_NL) == sum(map(len, rows))
    for number, answers in enumerate(rows):
        assert int(batch.mask_BK[number].sum()) == len(answers)
        for place, answer in enumerate(answers):
            text = batch.answers_BK[number, place]
            assert batch.tokens_NL[text][batch.mask_NL[text]].tolist() == answer
            assert not batch.mask_NL[text][len(answer) :].any()
