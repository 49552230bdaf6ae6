"""Preferences of every layout through one reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.data.layouts import PreferencePair, Ranking
from rlhf_dist.data.preferences import PreferenceReader
from rlhf_dist.data.reading import ReadOptions

START = "\n\nHuman: q\n\nAssistant:"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def files(folder: Path) -> list[str]:
    return [
        write(folder / "pairs.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}]),
        write(folder / "hh.jsonl", [{"chosen": START + " a", "rejected": START + " b"}]),
        write(folder / "ranked.jsonl", [{"prompt": "q", "answers": ["a", "b", "c"], "ranks": [3, 1, 2]}]),
        write(folder / "labelled.jsonl", [{"prompt": "q", "response_a": "b", "response_b": "a", "p": 0.1}]),
    ]


def test_rankings_are_kept_or_taken_apart(tmp_path: Path) -> None:
    kept = list(PreferenceReader(files(tmp_path)))
    assert [type(record) for record in kept] == [PreferencePair, PreferencePair, Ranking, PreferencePair]
    pairs = [record for record in PreferenceReader(files(tmp_path), rankings="pairs") if isinstance(record, PreferencePair)]
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        ("a", "b"), (" a", " b"), ("b", "c"), ("b", "a"), ("c", "a"), ("a", "b"),
    ]  # fmt: skip
    assert [pair.origin.source for pair in pairs] == ["pairs", "hh", "ranked", "ranked", "ranked", "labelled"]


def test_files_without_preferences_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "q", "completion": "a"}])
    with pytest.raises(UserError, match="holds demonstrations, not preferences"):
        list(PreferenceReader([path]))


def test_real_transcripts_lose_only_the_known_faults(shared: Path) -> None:
    paths = [str(shared / "data" / "hh-rlhf" / f"{name}-base-test.jsonl.gz") for name in ("harmless", "helpful")]
    reader = PreferenceReader(paths, ReadOptions("drop"))
    assert sum(1 for _ in reader) == 4642
    assert reader.counts.dropped == {"chosen equals rejected": 2, "empty final turn": 8, "prompts differ": 14}
    splits = {side: {r.prompt for r in PreferenceReader(paths, ReadOptions("drop", side, 0.2))} for side in ("train", "eval")}  # type: ignore[arg-type]
    assert not splits["train"] & splits["eval"] and 0.17 < len(splits["eval"]) / 4640 < 0.23


def test_real_rankings_as_pairs_of_chats(shared: Path) -> None:
    pairs = list(PreferenceReader([str(shared / "data" / "oasst-en100" / "pairs.derived.jsonl")]))
    assert len(pairs) == 212 and all(isinstance(pair.prompt, tuple) and pair.prompt[-1]["role"] == "user" for pair in pairs)
