"""The script once, on a small model of many words: it prints its table, and engines that take turns need less memory."""

from __future__ import annotations

import json
from pathlib import Path

import colocation
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_engines_that_take_turns_need_less_than_all_together(tmp_path: Path) -> None:
    """25 MiB of weights each: 250 MiB for all, 100 MiB for the largest phase."""
    colocation.main(
        rows=2, limit=4, hidden=128, layers=1, vocabulary=50000, steps=2, repeats=1, threads=1, results=tmp_path, job=""
    )  # fmt: skip
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    arithmetic, found = report["mib"], report["found"]
    assert arithmetic["held"] == pytest.approx(2.5 * arithmetic["largest"]) and 90 < arithmetic["largest"] < 110
    saved = found["none"]["run"]["median"] - found["idle"]["run"]["median"]
    assert saved > 0.4 * (arithmetic["held"] - arithmetic["largest"]), "words of which no row has one are never read into memory"
    assert found["none"]["resting"]["median"] == 0 < arithmetic["largest"] < found["idle"]["resting"]["median"]
    assert report["manifest"]["workload"]["ways"] == ["none", "idle"]
