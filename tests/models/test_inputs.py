"""What a forward is given: no padded slot gets in, positions count real tokens, and the width is that of the longest row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.models.inputs import HALF_PRECISION_STEP, blank_batch, model_inputs, response_slots, width_step

Rows = list[tuple[list[int], list[int]]]


tokens = st.lists(st.integers(1, 99), min_size=1, max_size=5)


def test_the_example_of_the_module(padded) -> None:
    inputs, places_BT = model_inputs(padded([([5], [6, 7]), ([1, 2, 3], [4])], garbage=88))
    assert inputs["input_ids"].tolist() == [[0, 5, 6, 7], [1, 2, 3, 4]]
    assert inputs["attention_mask"].tolist() == [[False, True, True, True], [True] * 4]
    assert inputs["position_ids"].tolist() == [[0, 0, 1, 2], [0, 1, 2, 3]]
    assert places_BT[0].tolist() == [2, 3] and places_BT[1, 0] == 3


@settings(deadline=None)
@given(rows=st.lists(st.tuples(tokens, tokens), min_size=1, max_size=4), extra=st.integers(0, 3))
def test_every_row_stands_whole_at_the_right_edge(padded, rows: Rows, extra: int) -> None:
    batch = padded(rows, extra, garbage=10**9)
    inputs, places_BT = model_inputs(batch)
    assert inputs["input_ids"].shape == (len(rows), max(len(p) + len(r) for p, r in rows))
    assert inputs["input_ids"].dtype == inputs["position_ids"].dtype == torch.int64 and inputs["attention_mask"].dtype == torch.bool
    for row, (prompt, response) in enumerate(rows):
        mask = inputs["attention_mask"][row]
        assert inputs["input_ids"][row][mask].tolist() == prompt + response
        assert not inputs["input_ids"][row][~mask].any() and not inputs["position_ids"][row][~mask].any()
        cumulated = mask.long().cumsum(0) - mask.long()  # NUMERICS §1
        assert inputs["position_ids"][row][mask].tolist() == cumulated[mask].tolist() == list(range(len(prompt) + len(response)))
        assert inputs["input_ids"][row, places_BT[row, : len(response)]].tolist() == response
    assert int(places_BT.min()) >= 0 and int(places_BT.max()) < inputs["input_ids"].shape[1]


@settings(deadline=None)
@given(rows=st.lists(st.tuples(tokens, tokens), min_size=1, max_size=4), garbage=st.integers(-(2**62), 2**62))
def test_garbage_in_padded_slots_changes_no_input(padded, rows: Rows, garbage: int) -> None:
    (clean, places), (dirty, dirty_places) = (model_inputs(padded(rows, 1, value)) for value in (0, garbage))
    assert all(torch.equal(clean[name], dirty[name]) for name in clean) and torch.equal(places, dirty_places)


def test_a_hole_in_the_response_is_closed_up(padded) -> None:
    """response_attention says which tokens exist; a slot between them that does not is padding like any other."""
    batch = padded([([1, 2], [3, 77, 5])])
    batch = batch.replace(response_attention_BT=torch.tensor([[True, False, True]]), response_mask_BT=torch.tensor([[True, False, True]]))
    inputs, places_BT = model_inputs(batch)
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 5]] and inputs["position_ids"].tolist() == [[0, 1, 2, 3]]
    assert places_BT[0, [0, 2]].tolist() == [2, 3]


def test_attended_tokens_that_are_not_trained_on_stay(padded) -> None:
    batch = padded([([1], [3, 4, 5])]).replace(response_mask_BT=torch.tensor([[True, False, True]]))
    inputs, _ = model_inputs(batch)
    assert inputs["input_ids"].tolist() == [[1, 3, 4, 5]]


def test_response_slots_are_those_of_the_response_tokens_and_no_others(padded) -> None:
    batch = padded([([1], [2, 3]), ([4, 5, 6], [7]), ([8, 9], [])], garbage=77)
    inputs, places_BT = model_inputs(batch)
    slots_N, numbers_BT = response_slots(batch, inputs, places_BT)
    assert inputs["input_ids"].flatten()[slots_N].tolist() == [2, 3, 7]
    assert inputs["input_ids"].flatten()[slots_N - 1].tolist() == [1, 2, 6]
    assert numbers_BT.tolist() == [[0, 1], [2, 3], [3, 3]]


def test_a_response_without_a_prompt_is_refused(padded) -> None:
    batch = padded([([1, 2], [3]), ([], [4, 5])])
    with pytest.raises(ValueError, match="without a prompt token"):
        response_slots(batch, *model_inputs(batch))


def test_a_blank_batch_is_a_forward_that_trains_on_nothing() -> None:
    blank = blank_batch()
    inputs, places_BT = model_inputs(blank)
    assert inputs["attention_mask"].all() and places_BT.tolist() == [[1]]
    assert not blank.response_mask_BT.any() and blank.valid_tokens_B.tolist() == [0]


@settings(deadline=None)
@given(rows=st.lists(st.tuples(tokens, tokens), min_size=1, max_size=4), extra=st.integers(0, 20), step=st.sampled_from([3, 7, 32]))
def test_a_wider_input_holds_the_same_at_its_right_edge(padded, rows: Rows, extra: int, step: int) -> None:
    """Wider than the longest row, and often than prompt and response columns of the batch together."""
    batch = padded(rows, extra, garbage=10**9)
    (narrow, places_BT), (wide, wide_places_BT) = model_inputs(batch), model_inputs(batch, step)
    longest, width = narrow["input_ids"].shape[1], wide["input_ids"].shape[1]
    assert width % step == 0 and 0 <= width - longest < step
    for name, tensor in wide.items():
        assert torch.equal(tensor[:, width - longest :], narrow[name]) and not tensor[:, : width - longest].any()
    valid_BT = batch.response_attention_BT
    assert torch.equal(wide_places_BT[valid_BT], places_BT[valid_BT] + width - longest)
    assert wide_places_BT.shape == places_BT.shape and int(wide_places_BT.min()) >= 0 and int(wide_places_BT.max()) < width


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 1), (torch.bfloat16, 16), (torch.float16, 16)])
def test_half_precision_has_widths_of_its_own(dtype: torch.dtype, step: int) -> None:
    assert width_step(torch.nn.Linear(2, 2, dtype=dtype)) == step and HALF_PRECISION_STEP == 16
