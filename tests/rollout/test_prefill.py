"""The pieces of a prefill: nothing left out, nothing twice, bounded, and a row's shapes its own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.rollout import prefill
from rlhf_dist.rollout.prefill import PREFILL_CHUNK, PREFILL_TOKENS, SPAN_STEP, Piece, pieces

LENGTHS = st.lists(st.integers(1, 3 * PREFILL_CHUNK), max_size=40)


@settings(deadline=None)
@given(lengths=LENGTHS, exact=st.booleans())
def test_every_position_once_in_order_and_within_bounds(lengths: list[int], exact: bool) -> None:
    reached = [0] * len(lengths)
    for piece in pieces(lengths, exact):
        assert piece.start % PREFILL_CHUNK == 0 and piece.width % SPAN_STEP == 0
        assert piece.width <= PREFILL_CHUNK and len(piece.rows) * piece.width <= PREFILL_TOKENS
        for row in piece.rows:
            assert reached[row] == piece.start < lengths[row]
            reached[row] = min(lengths[row], piece.start + piece.width)
    assert reached == lengths


@settings(deadline=None)
@given(lengths=LENGTHS)
def test_where_exact_a_rows_shapes_do_not_depend_on_the_others(lengths: list[int]) -> None:
    together = [[(p.start, p.width) for p in pieces(lengths, exact=True) if row in p.rows] for row in range(len(lengths))]
    assert together == [[(p.start, p.width) for p in pieces([length], exact=True)] for length in lengths]


def test_otherwise_rows_of_different_lengths_share_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(pieces([5, 20, 40, 600], exact=False)) == [Piece((3,), 0, 512), Piece((3,), 512, 96), Piece((2, 1, 0), 0, 48)]
    monkeypatch.setattr(prefill, "PREFILL_TOKENS", 96)
    assert list(pieces([5, 20, 40], exact=False)) == [Piece((2, 1), 0, 48), Piece((0,), 0, 16)]
