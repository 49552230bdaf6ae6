"""Which variants a training-step benchmark tries, and how rows lie in a forward."""

from __future__ import annotations

from typing import Any

import pytest
from training_step import Job, make, microbatches, rectangle

GIVEN: dict[str, Any] = {
    "model": "", "shape": {"hidden": 64, "layers": 2, "vocabulary": 100}, "rows": 8, "minibatches": 1, "limit": 16,
    "microbatch_tokens": 160, "rows_per_forward": 4, "dtypes": ("float32", "bfloat16"), "stages": (0, 1), "layouts": ("padded", "packed"),
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


def lengths_of(job: Job) -> list[int]:
    rows = make(job, "ragged")
    return [prompt + tokens for prompt, tokens in zip(rows.prompt_lengths, rows.lengths, strict=True)]


def test_padded_rows_stay_as_they_come_and_the_others_respect_the_budget() -> None:
    job = Job(**GIVEN)
    assert microbatches(job, "ragged", "padded", 0) == ((0, 1, 2, 3), (4, 5, 6, 7))
    packed, lengths = microbatches(job, "ragged", "packed", 0), lengths_of(job)
    assert sorted(row for part in packed for row in part) == list(range(8))
    assert all(sum(lengths[row] for row in part) <= job.microbatch_tokens for part in packed)


@pytest.mark.parametrize("kind", ["ragged", "full"])
def test_plain_rows_are_as_many_in_a_forward_as_the_budget_holds_rectangles(kind: str) -> None:
    job = Job(**GIVEN)
    slots, parts = rectangle(job, kind).slots, microbatches(job, kind, "plain", 0)
    assert slots >= max(lengths_of(job)) and [row for part in parts for row in part] == list(range(8))
    assert len(parts[0]) == job.microbatch_tokens // slots > 1


def test_ranks_share_the_rows_and_have_as_many_microbatches() -> None:
    for layout in ("plain", "padded", "packed"):
        parts = [microbatches(Job(**(GIVEN | {"rows": 7, "ranks": 2, "rank": rank})), "ragged", layout, 0) for rank in range(2)]
        assert len(parts[0]) == len(parts[1])
        assert sorted(row for part in parts for rows in part for row in rows) == list(range(7))


@pytest.mark.parametrize("layout", ["plain", "padded", "sorted", "packed"])
def test_minibatches_share_the_rows_and_plain_ones_the_rectangle(layout: str) -> None:
    job = Job(**(GIVEN | {"rows": 7, "minibatches": 3}))
    steps = [[row for rows in microbatches(job, "ragged", layout, number) for row in rows] for number in range(3)]
    assert [sorted(step) for step in steps] == [[0, 3, 6], [1, 4], [2, 5]]
    assert rectangle(job, "ragged") == rectangle(Job(**(GIVEN | {"rows": 7})), "ragged")
