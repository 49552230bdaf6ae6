"""Conversions keep what the rows say: texts, strengths, and the columns that no layout reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.config.errors import UserError
from rlhf_dist.data.conversion import TARGETS, as_transcript, as_turns, converted, transcript_turns
from rlhf_dist.data.layouts import LAYOUTS, Layout, Origin
from rlhf_dist.data.parsing import parse
from rlhf_dist.data.validation import ReadCounts, Reading, TypedRow, accepted, typed_rows

USER = {"role": "user", "content": "q"}
START = "\n\nHuman: q\n\nAssistant: early\n\nHuman: r\n\nAssistant:"
ROWS: dict[Layout, dict[str, Any]] = {
    "prompts": {"prompt": "q"},
    "demonstrations": {"prompt": "q", "completion": "a"},
    "messages": {"messages": [USER, {"role": "assistant", "content": "a"}]},
    "pairs": {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0.5},
    "transcripts": {"chosen": START + " a", "rejected": START + " b"},
    "rankings": {"prompt": "q", "answers": ["b", "a", "c"], "scores": [1, 3, 0]},
    "labelled": {"prompt": "q", "response_a": "b", "response_b": "a", "p": 0.25},
}


def convert(layout: Layout, row: dict[str, Any], target: Any) -> list[dict[str, Any]]:
    record = parse(row, layout, Origin("f.jsonl", 0, "f"))
    return list(converted([(TypedRow("f.jsonl", 0, layout, row, record, None), record)], target))


IMPOSSIBLE = {("prompts", "demonstrations")} | {
    (layout, target) for layout in ("prompts", "demonstrations", "messages") for target in ("pairs", "transcripts")
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_way_gives_rows_that_read_as_the_target_or_is_refused(layout: Layout, target: str, tmp_path: Path) -> None:
    row = ROWS[layout] | {"source": "s", "extra": 1}
    if (layout, target) in IMPOSSIBLE:
        with pytest.raises(UserError):
            convert(layout, row, target)
        return
    made, path = convert(layout, row, target), tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in made))
    read = [typed for typed, _ in accepted(typed_rows(str(path)), ReadCounts(), "error")]
    kept = "messages" if layout in ("demonstrations", "messages") else "pairs" if layout in ("transcripts", "labelled") else layout
    assert len(read) == len(made) and read[0].layout == (kept if target == "messages" else target)
    assert all(one["source"] == "s" and one["extra"] == 1 for one in made)


def test_pairs_of_rankings_labels_and_transcripts() -> None:
    assert convert("rankings", ROWS["rankings"], "pairs") == [
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2.0},
        {"prompt": "q", "chosen": "a", "rejected": "c", "margin": 3.0},
        {"prompt": "q", "chosen": "b", "rejected": "c", "margin": 1.0},
    ]
    assert convert("labelled", ROWS["labelled"], "pairs") == [{"prompt": "q", "chosen": "a", "rejected": "b", "p": 0.75}]
    assert convert("transcripts", ROWS["transcripts"], "pairs") == [{"prompt": START, "chosen": " a", "rejected": " b"}]
    assert convert("transcripts", ROWS["transcripts"], "transcripts") == [ROWS["transcripts"]]
    assert convert("pairs", {"chosen": "a", "rejected": "b"}, "pairs") == [{"chosen": "a", "rejected": "b"}]


def test_turns_of_transcripts() -> None:
    (row,) = convert("transcripts", ROWS["transcripts"], "messages")
    turns = [USER, {"role": "assistant", "content": "early"}, {"role": "user", "content": "r"}]
    assert row == {"messages": turns, "chosen": "a", "rejected": "b"}
    assert convert("pairs", row, "transcripts") == [ROWS["transcripts"]]
    assert transcript_turns("Be kind." + START)[0] == {"role": "system", "content": "Be kind."}


@given(st.lists(st.sampled_from(["hello", "a: b", "x\n\ny", "Human: no"]), min_size=1, max_size=5).filter(lambda said: len(said) % 2))
def test_turns_and_transcripts_are_inverse(said: list[str]) -> None:
    turns = tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said))
    assert transcript_turns(as_transcript(turns)) == turns == as_turns(as_transcript(turns))


def test_demonstrations_take_the_better_answer_and_prompts_keep_follow_ups() -> None:
    assert convert("rankings", ROWS["rankings"], "demonstrations") == [{"prompt": "q", "completion": "a"}]
    assert convert("labelled", ROWS["labelled"], "demonstrations") == [{"prompt": "q", "completion": "a"}]
    assert convert("messages", ROWS["messages"], "demonstrations") == [{"prompt": [USER], "completion": "a"}]
    assert convert("prompts", {"turns": ["q", "r"], "id": 3}, "prompts") == [{"prompt": "q", "follow_ups": ["r"], "id": 3}]


def test_what_cannot_be_said_in_the_target_is_refused() -> None:
    with pytest.raises(UserError, match="no prompt"):
        convert("pairs", {"chosen": "a", "rejected": "b"}, "messages")
    tool = [USER, {"role": "tool", "content": "3"}]
    with pytest.raises(UserError, match="'tool'") as caught:
        convert("pairs", {"messages": tool, "chosen": "a", "rejected": "b"}, "transcripts")
    assert caught.value.where == "f.jsonl:1"


def test_real_files(shared: Path) -> None:
    path = str(shared / "data" / "hh-rlhf" / "helpful-base-test.jsonl.gz")
    rows = list(converted(accepted(typed_rows(path, Reading()), ReadCounts(), "drop"), "transcripts"))
    given_rows = [typed.row for typed in typed_rows(path) if typed.fault is None]
    assert rows == given_rows and len(rows) == 2339
    chats = list(converted(accepted(typed_rows(path), ReadCounts(), "drop"), "messages"))
    assert all(row["messages"][0]["role"] == "user" and row["messages"][-1]["role"] == "user" for row in chats[:300])
