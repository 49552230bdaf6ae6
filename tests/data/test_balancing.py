"""Caps and weights by group."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.data import balancing
from rlhf_dist.data.balancing import Grouping, capped, group_counts, weighted, weights
from rlhf_dist.data.validation import ReadCounts, accepted, typed_rows


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "x.jsonl"
    rows = [{"prompt": f"q{n}", "completion": "a", "source": "web" if n % 10 else "lab", "label": n % 3, "n": n} for n in range(1000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(path: str) -> Any:
    return accepted(typed_rows(path), ReadCounts(), "error")


def test_a_cap_keeps_small_groups_whole_and_draws_from_large_ones(file: str) -> None:
    draws = {}
    for seed in (0, 1):
        kept = list(capped(lambda: rows(file), Grouping("source"), 150, seed))
        assert Counter(record.origin.source for _, record in kept) == {"web": 150, "lab": 100}
        numbers = [typed.number for typed, _ in kept]
        assert numbers == sorted(numbers) == [typed.number for typed, _ in capped(lambda: rows(file), Grouping("source"), 150, seed)]
        draws[seed] = numbers
        thirds = Counter(n // 334 for n in numbers if n % 10)
        assert min(thirds.values()) > 30
    assert draws[0] != draws[1]


def test_weights_give_each_group_the_same_total_and_rows_the_mean_one(file: str) -> None:
    grouping = Grouping("source")
    counts = group_counts(rows(file), grouping)
    assert counts == {"lab": 100, "web": 900}
    totals: Counter[str] = Counter()
    for (_, record), weight in weighted(rows(file), grouping, weights(counts)):
        totals[record.origin.source] += weight  # type: ignore[assignment]
    assert totals["lab"] == pytest.approx(500) and totals["web"] == pytest.approx(500)


def test_weights_multiply_those_of_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "q", "completion": "a", "weight": 3}\n')
    ((_, weight),) = weighted(rows(str(path)), Grouping("source"), {"x": 2.0})
    assert weight == 6.0


def test_groups_by_label_and_column(file: str, tmp_path: Path) -> None:
    assert group_counts(rows(file), Grouping("label")) == {"0": 334, "1": 333, "2": 333}
    path = tmp_path / "labelled.jsonl"
    made = [{"prompt": "q", "response_a": "x", "response_b": "y", "label": label} for label in ("a", "a", "B", "tie")]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    assert group_counts(rows(str(path)), Grouping("label")) == {"a": 2, "b": 1, "tie": 1}
    assert group_counts(rows(str(path)), Grouping("prompt")) == {"q": 4}
    path.write_text('{"prompt": "q", "answers": ["a", "b"], "ranks": [2, 1]}\n{"prompt": "r", "answers": ["a", "b"], "ranks": [1, 2]}\n')
    assert group_counts(rows(str(path)), Grouping("label")) == {"best at 2": 1, "best at 1": 1}
    path.write_text('{"prompt": "q"}\n')
    assert group_counts(rows(str(path)), Grouping("label")) == {"(none)": 1}


def test_missing_columns_and_too_many_groups_are_refused(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no column 'topic'") as caught:
        group_counts(rows(file), Grouping("topic"))
    assert caught.value.where == f"{file}:1"
    monkeypatch.setattr(balancing, "MAX_GROUPS", 20)
    with pytest.raises(UserError, match="more than 20 groups"):
        group_counts(rows(file), Grouping("n"))
    with pytest.raises(UserError, match="more than 20 groups"):
        list(capped(lambda: rows(file), Grouping("n"), 1, 0))
    with pytest.raises(ValueError, match="at least one"):
        list(capped(lambda: rows(file), Grouping("n"), 0, 0))
