"""What the `data` verbs print, and the list of faults as JSON."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from rlhf_dist.cli.data_tables import SHOWN_SOURCES, FaultList, print_balance, print_counts, print_statistics
from rlhf_dist.data.statistics import FileCounts, Overlap, Statistics
from rlhf_dist.data.validation import ReadCounts


def test_faults_stream_into_one_json_object(tmp_path: Path) -> None:
    for faults in ([], [{"where": "a:1", "reason": "é"}, {"where": "a:2", "reason": '"'}]):
        path = tmp_path / "x.json"
        with FaultList(path) as listed:
            for fault in faults:
                listed.add(fault)
            listed.finish({"rows": 3})
        assert json.loads(path.read_text(encoding="utf-8")) == {"faults": faults, "rows": 3}
    with FaultList(None) as silent:
        silent.add({})
        silent.finish({})


def test_counts_name_the_drops_and_damaged_files(capsys: pytest.CaptureFixture[str]) -> None:
    print_counts(ReadCounts(3, 1, 0, Counter({"prompts differ": 2})), damaged=1)
    assert capsys.readouterr().out == "1 of 3 rows accepted, 2 dropped (2 prompts differ), 1 files could not be read to their end\n"


def test_statistics_show_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    files = [FileCounts(f"{name}.jsonl", "pairs", ReadCounts(10, 8, 0, Counter({"prompts differ": 2}))) for name in "ab"]
    lengths = {"prompt": {"count": 16, "min": 1, "median": 2, "p90": 3, "max": 4327, "mean": 2.5}}
    sources = {f"s{n}": {"rows": 30 - n, "chosen longer": n} for n in range(SHOWN_SOURCES + 3)}
    overlaps = (Overlap("a.jsonl", "b.jsonl", 5, 6, (("a.jsonl:1", "b.jsonl:2"),)), Overlap("a.jsonl", "c.jsonl", 0, 0))
    print_statistics(Statistics(tuple(files), lengths, {}, sources, 7, 11, 13, overlaps))
    out = capsys.readouterr().out
    for text in (
        "4,327",
        "prompts differ",
        "repeated rows: 7",
        "distinct prompts: 11",
        "5 equal, 6 nearly equal",
        "b.jsonl:2 is near a.jsonl:1",
    ):
        assert text in out
    assert "3 more sources" in out and "1 of 2" in out and "tokens" not in out


def test_balance_shows_shares_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_balance("source", {"web": 900, "lab": 100}, {"web": 900, "lab": 100}, {"web": 1000 / 1800, "lab": 5.0})
    assert capsys.readouterr().out.count("50.0%") == 2
