"""Which variants a training-step benchmark tries, and how rows lie in a forward."""

from __future__ import annotations

from typing import Any

from training_step import Job, cut

GIVEN: dict[str, Any] = {
    "model": "", "shape": {"hidden": 64, "layers": 2, "vocabulary": 100}, "rows": 8, "limit": 16, "microbatch_tokens": 40,
    "rows_per_forward": 4, "dtypes": ("float32", "bfloat16"), "stages": (0, 1), "layouts": ("padded", "packed"),
    "lengths": ("ragged", "full"), "repeats": 1, "warm_up": 0, "threads": 1,
}  # fmt: skip


def test_stages_are_compared_on_one_layout_and_half_precision_has_no_stage_0() -> None:
    found = Job(**GIVEN).variants()
    assert len(found) == len(set(found))
    assert [v for v in found if v[0] == "float32"] == [
        ("float32", 0, "ragged", "padded"),
        ("float32", 0, "ragged", "packed"),
        ("float32", 0, "full", "padded"),
        ("float32", 0, "full", "packed"),
        ("float32", 1, "ragged", "packed"),
    ]
    assert {v[1] for v in found if v[0] == "bfloat16"} == {1}


def test_padded_rows_stay_as_they_come_and_the_others_respect_the_budget() -> None:
    lengths = [30, 5, 10, 20, 5, 30, 10, 20]
    assert cut(Job(**GIVEN), lengths, "padded") == ((0, 1, 2, 3), (4, 5, 6, 7))
    packed = cut(Job(**GIVEN), lengths, "packed")
    assert sorted(row for part in packed for row in part) == list(range(8))
    assert all(sum(lengths[row] for row in part) <= 40 for part in packed)


def test_ranks_share_the_rows_and_have_as_many_microbatches() -> None:
    lengths = [30, 5, 10, 20, 5, 30, 10]
    for layout in ("padded", "packed"):
        parts = [cut(Job(**(GIVEN | {"ranks": 2, "rank": rank, "rows_per_forward": 2})), lengths, layout) for rank in range(2)]
        assert len(parts[0]) == len(parts[1])
        assert sorted(row for part in parts for rows in part for row in rows) == list(range(7))
