"""Every reason has its remedy, and a fault becomes the error that stops a run."""

from __future__ import annotations

from typing import get_args

from rlhf_dist.data.faults import MEND, Reason, RowFault


def test_every_reason_says_how_to_mend_it() -> None:
    assert set(MEND) == set(get_args(Reason)) and all(MEND.values())


def test_the_error_names_the_row_and_the_ways_out() -> None:
    fault = RowFault("chosen equals rejected", "they are the same", where="a.jsonl:3")
    assert (fault.as_error().what, fault.as_error().where) == ("they are the same", "a.jsonl:3")
    assert fault.as_error().fix.startswith(MEND[fault.reason]) and "drop" in fault.as_error().fix
    assert "drop" not in fault.as_error(may_drop=False).fix
