"""Carriers: cutting, joining and merging keep every real token and never let padding in."""

import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.contracts.experience import ExperienceBatch, Piece, SequenceBatch, StopReason, merge_pieces

ROW = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(1, 99), min_size=1, max_size=5),
        "response": st.lists(st.tuples(st.integers(1, 99), st.booleans()), max_size=6),
    }
)
ROWS = st.lists(ROW, min_size=1, max_size=6)
FLOATS = ("rollout_logprobs_BT", "values_BT")


def build(rows, slack=(0, 0), poison_token=0, poison_value=0.0):
    """A batch out of ragged rows; each response token comes with whether the policy chose it. The value at a token is token / 7."""
    width_P = max(len(row["prompt"]) for row in rows) + slack[0]
    width_T = max(len(row["response"]) for row in rows) + slack[1]
    tokens = {"P": torch.full((len(rows), width_P), poison_token), "T": torch.full((len(rows), width_T), poison_token)}
    values_BT = torch.full((len(rows), width_T), poison_value)
    prompt_mask_BP = torch.zeros(len(rows), width_P, dtype=torch.bool)
    mask_BT, attention_BT = (torch.zeros(len(rows), width_T, dtype=torch.bool) for _ in range(2))
    for b, row in enumerate(rows):
        start = width_P - len(row["prompt"])
        tokens["P"][b, start:] = torch.tensor(row["prompt"])
        prompt_mask_BP[b, start:] = True
        for t, (token, chosen) in enumerate(row["response"]):
            tokens["T"][b, t], values_BT[b, t] = token, token / 7
            attention_BT[b, t], mask_BT[b, t] = True, chosen
    numbers = torch.arange(len(rows))
    return ExperienceBatch(
        prompt_tokens_BP=tokens["P"],
        prompt_mask_BP=prompt_mask_BP,
        response_tokens_BT=tokens["T"],
        response_mask_BT=mask_BT,
        response_attention_BT=attention_BT,
        prompt_id_B=numbers + 100,
        sample_index_B=numbers,
        policy_version_B=torch.zeros_like(numbers),
        stop_reason_B=torch.full_like(numbers, int(StopReason.LENGTH)),
        rollout_logprobs_BT=values_BT,
        prompts=tuple(str(row["prompt"]) for row in rows),
        completions=tuple(str(row["response"]) for row in rows),
        columns={"row": tuple(range(len(rows)))},
        values_BT=values_BT.clone(),
    )


def read(batch):
    """The rows back out of a batch, and a check that text, columns and floats still stand beside their tokens."""
    rows = []
    for b in range(len(batch)):
        prompt = batch.prompt_tokens_BP[b][batch.prompt_mask_BP[b]].tolist()
        there = batch.response_attention_BT[b]
        tokens = batch.response_tokens_BT[b][there].tolist()
        rows.append({"prompt": prompt, "response": list(zip(tokens, batch.response_mask_BT[b][there].tolist(), strict=True))})
        assert batch.prompts[b] == str(prompt) and batch.completions[b] == str(rows[-1]["response"])
        for name in FLOATS:
            assert getattr(batch, name)[b][there].tolist() == pytest.approx([token / 7 for token in tokens])
    return rows


def is_tight(batch):
    longest = {"P": batch.prompt_lengths_B.max(), "T": batch.response_lengths_B.max()} if len(batch) else {"P": 0, "T": 0}
    return all(
        value.shape[1] == longest[f.name[-1]]
        for f in dataclasses.fields(batch)
        if f.name.endswith(("_BP", "_BT")) and (value := getattr(batch, f.name)) is not None
    )


@given(ROWS, st.tuples(st.integers(0, 3), st.integers(0, 3)), st.data())
def test_select_gives_the_asked_rows_in_the_asked_order_without_needless_padding(rows, slack, data):
    picks = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))
    batch = build(rows, slack, poison_token=-1, poison_value=math.nan)
    got = batch.select(picks)
    assert read(got) == [rows[i] for i in picks]
    assert got.columns["row"] == tuple(picks) and got.sample_index_B.tolist() == picks
    assert is_tight(got)
    assert read(batch) == rows, "the source is left alone"


@given(st.lists(ROWS, min_size=1, max_size=4))
def test_concat_then_select_restores_every_batch(groups):
    batches = [build(rows, slack=(1, 2), poison_token=7, poison_value=math.nan) for rows in groups]
    whole = ExperienceBatch.concat(batches)
    assert read(whole) == [row for rows in groups for row in rows]
    start = 0
    for rows in groups:
        assert read(whole.select(range(start, start + len(rows)))) == rows
        start += len(rows)


@given(ROWS, st.data())
def test_padding_never_leaks(rows, data):
    picks = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    clean = build(rows, slack=(2, 2))
    poisoned = build(rows, slack=(2, 2), poison_token=10**6, poison_value=math.nan)
    joined = [ExperienceBatch.concat([b.select(picks), b]) for b in (clean, poisoned)]
    assert read(joined[0]) == read(joined[1])
    for name in ("prompt_mask_BP", "response_mask_BT", "response_attention_BT", "prompt_lengths_B", "valid_tokens_B"):
        assert torch.equal(getattr(joined[0], name), getattr(joined[1], name))


@given(ROWS)
def test_lengths_are_counted_from_masks(rows):
    batch = build(rows, slack=(1, 1), poison_token=5)
    assert batch.prompt_lengths_B.tolist() == [len(row["prompt"]) for row in rows]
    assert batch.response_lengths_B.tolist() == [len(row["response"]) for row in rows]
    assert batch.valid_tokens_B.tolist() == [sum(chosen for _, chosen in row["response"]) for row in rows]


def test_a_gap_in_the_attention_is_not_a_reason_to_trim():
    batch = build([{"prompt": [1], "response": [(2, True), (3, False), (4, True)]}], slack=(0, 2))
    hole = batch.replace(response_attention_BT=batch.response_attention_BT & torch.tensor([[True, False, True, True, True]]))
    assert hole.select([0]).response_tokens_BT.tolist() == [[2, 3, 4]]


def test_selecting_nothing_gives_an_empty_batch_that_joins():
    batch = build([{"prompt": [1, 2], "response": [(3, True)]}])
    empty = batch.select([])
    assert len(empty) == 0 and is_tight(empty)
    assert read(ExperienceBatch.concat([empty, batch])) == read(batch)


def test_concat_refuses_nothing_and_half_filled_fields():
    batch = build([{"prompt": [1], "response": [(2, True)]}])
    with pytest.raises(ValueError, match="at least one batch"):
        ExperienceBatch.concat([])
    with pytest.raises(ValueError, match="values_BT is filled in some batches only"):
        ExperienceBatch.concat([batch, batch.replace(values_BT=None)])
    assert ExperienceBatch.concat([batch, batch]).score_B is None


def test_a_column_that_only_some_batches_have_stays_beside_its_rows():
    two = build([{"prompt": [1], "response": []}, {"prompt": [2], "response": []}])
    joined = ExperienceBatch.concat(
        [two.replace(columns={"answer": (5, 6)}), two.replace(columns={}), two.replace(columns={"other": (7, 8)})]
    )
    assert joined.columns == {"answer": (5, 6, None, None, None, None), "other": (None, None, None, None, 7, 8)}


def test_a_plain_sequence_batch_needs_no_rollout_fields():
    full = build([{"prompt": [1, 2], "response": [(3, True)]}, {"prompt": [4], "response": [(5, True), (6, True)]}])
    plain = SequenceBatch(**{f.name: getattr(full, f.name) for f in dataclasses.fields(SequenceBatch)})
    joined = SequenceBatch.concat([plain.select([1]), plain.select([0])])
    assert type(joined) is SequenceBatch
    assert joined.response_tokens_BT.tolist() == [[5, 6], [3, 0]] and joined.prompt_tokens_BP.tolist() == [[0, 4], [1, 2]]


def test_a_batch_is_frozen_travels_and_moves():
    batch = build([{"prompt": [1], "response": [(2, True)]}])
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.prompts = ()  # type: ignore[misc]
    assert read(pickle.loads(pickle.dumps(batch))) == read(batch)
    moved = batch.to("meta")
    assert moved.values_BT.device.type == "meta" and moved.prompts == batch.prompts and moved.score_B is None


@settings(max_examples=50)
@given(ROWS, st.integers(1, 4), st.randoms(use_true_random=False))
def test_pieces_of_any_ranks_in_any_order_fill_the_shard(rows, ranks, random):
    batch = build(rows, slack=(1, 1))
    owner = [random.randrange(ranks) for _ in rows]
    pieces = []
    for rank in range(ranks):
        mine = [i for i, who in enumerate(owner) if who == rank]
        part = batch.select(mine)  # trimmed: narrower than the shard
        pieces.append(Piece(tuple(mine), {"ref_logprobs_BT": part.values_BT, "bootstrap_value_B": part.sample_index_B.float()}))
    random.shuffle(pieces)
    merged = merge_pieces(batch, pieces)
    there = batch.response_attention_BT
    assert merged.ref_logprobs_BT.shape == batch.values_BT.shape
    assert torch.equal(merged.ref_logprobs_BT[there], batch.values_BT[there])
    assert merged.bootstrap_value_B.tolist() == batch.sample_index_B.tolist()
    assert batch.ref_logprobs_BT is None


def test_a_row_that_no_rank_computed_is_an_error_with_the_field_and_the_count():
    batch = build([{"prompt": [1], "response": [(2, True)]}] * 3)
    piece = Piece((1,), {"ref_logprobs_BT": torch.zeros(1, 1)})
    with pytest.raises(ValueError, match="ref_logprobs_BT: 2 of 3 rows were computed by no rank"):
        merge_pieces(batch, [piece])


def test_no_pieces_change_nothing():
    batch = build([{"prompt": [1], "response": [(2, True)]}])
    assert merge_pieces(batch, []).ref_logprobs_BT is None
