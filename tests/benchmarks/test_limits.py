"""The roofline's formulas against values worked out by hand, and the growth that they predict."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import Ceilings, Iteration, Lengths, Sampled, decode_flops, decode_seconds, decode_steps, prefill_flops, sequences_flops

from rlhf_dist.contracts.flops import FlopModel

# 50 weights in the layers, 10 in the head, one layer of query width 4 and of key width 2.
MODEL = Sampled(FlopModel(linear=2 * 50, attention=2 * 1 * 4, head=2 * 10), kv_numbers=2 * 1 * 2)
TWO = Lengths(prompts=[3, 5], completions=[2, 4])


def test_prefill_is_every_prompt_token_and_a_head_a_row() -> None:
    assert prefill_flops(MODEL, TWO) == 2 * 50 * 8 + 2 * 4 * (9 + 25) + 2 * 10 * 2


def test_rows_leave_the_decode_steps_as_they_end() -> None:
    # The first token comes from the prefill: a row of R tokens lives through R − 1 steps, and attends to P + t keys in step t.
    assert decode_steps(TWO) == [(2, 4 + 6), (1, 7), (1, 8)]


def test_decode_operations_are_2n_a_row_and_4_l_d_a_key() -> None:
    assert decode_flops(MODEL, TWO) == 2 * 60 * (2 + 1 + 1) + 4 * 4 * (10 + 7 + 8)


def test_a_decode_step_takes_the_longer_of_reading_and_computing() -> None:
    # Bytes, 2 a number: 120 + 8 a key. Operations: 120 a row + 16 a key. At F = W the first step computes longer, the others read.
    even = Ceilings(flops=1.0, bytes_per_second=1.0)
    assert decode_seconds(MODEL, TWO, even, width=2) == max(200, 400) + max(176, 232) + max(184, 248)
    slow_memory = Ceilings(flops=1.0, bytes_per_second=0.1)
    assert decode_seconds(MODEL, TWO, slow_memory, width=2) == pytest.approx(2000 + 1760 + 1840)
    mixed = Ceilings(flops=1.0, bytes_per_second=0.6)  # reading takes 333, 293, 307
    assert decode_seconds(MODEL, TWO, mixed, width=2) == pytest.approx(400 + 176 / 0.6 + 184 / 0.6)


def test_scoring_and_training_are_forwards_of_whole_sequences() -> None:
    forward = 2 * 50 * 14 + 2 * 4 * (25 + 81) + 2 * 10 * 6
    assert sequences_flops(MODEL.flops, TWO) == forward
    plain, again = (MODEL.flops.training(frozen=False, recomputed=on) for on in (False, True))
    iteration = Iteration(MODEL, scored=[MODEL.flops, MODEL.flops], trained=[plain], epochs=2)
    least = iteration.seconds(TWO, Ceilings(flops=10.0, bytes_per_second=1e9), width=4)
    assert least["score"] == pytest.approx(2 * forward / 10)
    assert least["train"] == pytest.approx(2 * 3 * forward / 10)
    assert least["generate"] == least["prefill"] + least["decode"]
    # Full checkpointing runs the layers forward once more, k = 4, but not the head.
    assert sequences_flops(again, TWO) == 4 * forward - 2 * 10 * 6


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=8))
def test_operations_double_with_the_batch_and_more_than_double_with_the_length(rows: list[tuple[int, int]]) -> None:
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    iteration = Iteration(MODEL, [MODEL.flops], [MODEL.flops])
    once = iteration.flops(Lengths(prompts, completions))
    assert iteration.flops(Lengths(prompts * 2, completions * 2)) == pytest.approx(2 * once)
    longer = iteration.flops(Lengths([2 * p for p in prompts], [2 * c for c in completions]))
    # Weights alone would double it (but for the token that a prefill gives), attention alone would take it to four.
    assert 2 * once - 2 * 60 * 2 * len(rows) < longer < 4 * once + 2 * 60 * 2 * len(rows)


def test_growth_with_the_length_lies_between_2_and_4_by_the_share_of_attention() -> None:
    linear, quadratic = Sampled(FlopModel(100.0, 0.0), 4), Sampled(FlopModel(0.0, 8.0), 4)
    short, long = Lengths([100], [100]), Lengths([200], [200])
    scoring = [Iteration(model, [model.flops], []) for model in (linear, quadratic)]
    assert [each.scoring_flops(long) / each.scoring_flops(short) for each in scoring] == [2, 4]
