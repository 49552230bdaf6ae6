"""Pairs: which side is better, what is dropped, and how they stand in a batch."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from rlhf_dist.data.answers import AnswersRow
from rlhf_dist.data.layouts import Origin
from rlhf_dist.data.pairs import PairRow, collate_pairs, pair_of, sequences
from rlhf_dist.data.token_rows import TokenRow


def tokens(*ids: int, trained: int = 1) -> TokenRow:
    return TokenRow(np.array(ids, np.int32), np.arange(len(ids)) >= len(ids) - trained)


GOOD, BAD = tokens(1, 5, 6, 2, trained=2), tokens(1, 5, 7)


def answers(probability: float | None = None, weight: float = 1.0) -> AnswersRow:
    return AnswersRow((GOOD, BAD), 0, "file", label_probability=probability, weight=weight)


def test_a_hard_label_stays_hard() -> None:
    for soft in (True, False):
        assert pair_of(answers(weight=2.0), soft_labels=soft) == (PairRow(GOOD, BAD, None, 2.0), "")


def test_a_pair_knows_where_it_came_from() -> None:
    origin = Origin("rows.jsonl", 3, "file")
    pair, _ = pair_of(dataclasses.replace(answers(0.3), origin=origin), soft_labels=True)
    assert pair is not None and pair.origin == origin and pair == PairRow(BAD, GOOD, 0.7), "which is no part of what it is"


def test_soft_labels_are_kept_with_the_likelier_answer_first() -> None:
    assert pair_of(answers(0.8), soft_labels=True) == (PairRow(GOOD, BAD, 0.8), "")
    assert pair_of(answers(0.5), soft_labels=True) == (PairRow(GOOD, BAD, 0.5), "")
    turned, fate = pair_of(answers(0.3), soft_labels=True)
    assert turned == PairRow(BAD, GOOD, 0.7) and fate == ""


def test_where_a_loss_reads_no_probability_that_is_counted() -> None:
    pair, fate = pair_of(answers(0.8), soft_labels=False)
    assert pair == PairRow(GOOD, BAD) and fate.startswith("label taken as certain")
    assert pair_of(answers(0.3), soft_labels=False)[0] == PairRow(BAD, GOOD)
    assert pair_of(answers(1.0), soft_labels=False) == (PairRow(GOOD, BAD), "")
    tie, fate = pair_of(answers(0.5), soft_labels=False)
    assert tie is None and fate.startswith("dropped: a tie")


def test_what_a_pair_costs() -> None:
    assert len(PairRow(GOOD, BAD)) == 8 and PairRow(GOOD, BAD).tokens == 7


def test_chosen_first_then_rejected() -> None:
    rows = [PairRow(GOOD, BAD, None, 1.0, (-1.0, -2.0)), PairRow(BAD, GOOD, 0.75, 3.0, (-3.0, -4.0))]
    batch = collate_pairs(rows)
    assert batch.response_mask_BT.sum(1).tolist() == [2, 1, 1, 2]
    assert batch.response_tokens_BT[:, 0].tolist() == [6, 7, 7, 6]
    assert batch.ref_logprob_2B.tolist() == [-1.0, -3.0, -2.0, -4.0]
    assert math.isnan(batch.label_probability_B[0]) and batch.label_probability_B[1] == 0.75
    assert batch.weight_B.tolist() == [1.0, 3.0]
    alone = sequences(rows)
    assert torch.equal(alone.response_tokens_BT, batch.response_tokens_BT) and not hasattr(alone, "weight_B")


def test_a_pair_that_the_reference_was_not_asked_about_cannot_be_trained_on() -> None:
    rows = [PairRow(GOOD, BAD, reference=(-1.0, -1.0)), PairRow(GOOD, BAD)]
    with pytest.raises(ValueError, match="1 of 2 pairs"):
        collate_pairs(rows)
    collate_pairs([rows[0], dataclasses.replace(rows[1], reference=(0.0, 0.0))])
