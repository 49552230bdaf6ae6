"""Rows in a capsule come back bit for bit, NaN included; a file that is damaged is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_dist.config.errors import UserError
from rlhf_dist.data.answers import AnswersRow
from rlhf_dist.data.layouts import Origin
from rlhf_dist.data.pairs import PairRow
from rlhf_dist.data.token_rows import TokenRow
from rlhf_dist.runs.capsule_rows import NumberedRow, read_rows, write_rows, written

ORIGIN = Origin("data/ünicode\u2028.jsonl", 12, "a source")
NUMBERS = st.floats() | st.none()


def text(*ids: int, weight: float = 1.0, origin: Origin | None = None) -> TokenRow:
    return TokenRow(np.array(ids, np.int32), np.arange(len(ids)) > 0, weight, origin)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.tuples(*[NUMBERS] * 3), st.floats(), st.sampled_from([None, ORIGIN]))
def test_rows_of_every_stage_come_back(tmp_path: Path, odd: tuple[Any, ...], weight: float, origin: Origin | None) -> None:
    reference = None if odd[0] is None else (odd[0], weight)
    rows = [
        NumberedRow(0, text(1, 2**31 - 1, weight=weight, origin=origin)),
        NumberedRow(10**9, PairRow(text(1, 5), text(1, 6, 7), odd[1], weight, reference, origin)),
        NumberedRow(3, AnswersRow((text(1, 5), text(1, 6), text(1, 7)), 4, "s", odd[1], odd[2], weight, origin)),
    ]
    write_rows(tmp_path, 3, rows)
    found = read_rows(tmp_path, 3)
    assert repr(found) == repr(tuple(rows)) and found[0].row.origin == origin
    assert isinstance(found[0].row, TokenRow) and found[0].row.tokens.dtype == np.int32 and found[0].row.trained.dtype == np.bool_
    assert len((tmp_path / "rows_0003.jsonl").read_text().split("\n")) == 4


def line(**changes: Any) -> str:
    row = {"number": 1, "origin": None, "weight": 1.0, "kind": "demonstration", "text": {"tokens": [1, 2], "trained": "01"}}
    return json.dumps({name: value for name, value in (row | changes).items() if value != "gone"}) + "\n"


@pytest.mark.parametrize(
    "content",
    [None, b"\xff", "{", "[]\n", line(kind="other"), line(kind="pair"), line(number=-1), line(weight="gone"), line(more=1),
     line(weight="x"), line(text={"tokens": [1], "trained": "01"}), line(text={"tokens": [1, -1], "trained": "01"}), "[" * 100_000],
)  # fmt: skip
def test_what_is_damaged_is_refused_by_name(tmp_path: Path, content: str | bytes | None) -> None:
    if content is not None:
        (tmp_path / "rows_0000.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"the file rows_0000\.jsonl of the capsule cannot be read") as refused:
        read_rows(tmp_path, 0)
    assert refused.value.where == str(tmp_path) and refused.value.fix


def test_json_has_no_nan() -> None:
    assert written({"a": (1.5, math.inf), "b": [{"c": math.nan}], "d": "x", "e": None}) == {
        "a": [1.5, "inf"],
        "b": [{"c": "nan"}],
        "d": "x",
        "e": None,
    }
