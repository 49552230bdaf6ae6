"""Layouts are told by their columns; records keep what rows say."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_dist.data.layouts import NAMES, Origin, Ranking, column_of, compatible, detect, names_with, other_columns, value_of

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "prompts": [{"prompt": "q"}, {"messages": [USER]}, {"turns": ["q", "r"]}, {"instruction": "q", "category": "c"}],
    "demonstrations": [
        {"prompt": "q", "completion": "a"},
        {"question": "q", "answer": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "instances": [{"input": "", "output": "a"}]},
        {"prompt": [USER], "completion": [ASSISTANT]},
    ],
    "messages": [{"messages": [USER, ASSISTANT]}],
    "pairs": [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"messages": [USER], "chosen": "a", "rejected": "b"},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
        {"chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a"},
        {"prompt": "q", "messages": [USER, ASSISTANT], "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT], "score_chosen": 1.0},
    ],
    "transcripts": [{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}],
    "rankings": [{"prompt": "q", "answers": ["a", "b"], "ranks": [1, 2]}, {"prompt": "q", "responses": ["a", "b"], "scores": [2.0, 1.0]}],
    "labelled": [
        {"prompt": "q", "response_a": "a", "response_b": "b", "label": "a"},
        {"prompt": "q", "response_a": "a", "response_b": "b", "p": 0.3},
    ],
}


@pytest.mark.parametrize("layout, row", [(layout, row) for layout, rows in ROWS.items() for row in rows])
def test_columns_tell_the_layout(layout: str, row: dict[str, Any]) -> None:
    assert detect(row) == layout and compatible(row, layout)  # type: ignore[arg-type]


@pytest.mark.parametrize("row", [{}, {"text": "x"}, {"prompt": None}, {"completion": "a"}, {"ranks": [1, 2]}])
def test_what_tells_nothing_is_none(row: dict[str, Any]) -> None:
    assert detect(row) is None


@pytest.mark.parametrize(
    "layout, other",
    [(one, two) for one in ROWS for two in ROWS if one != two and {one, two} != {"pairs", "transcripts"} and two != "prompts"],
)
def test_a_row_of_another_layout_is_not_compatible(layout: Any, other: str) -> None:
    assert not compatible(ROWS[other][0], layout)


@pytest.mark.parametrize(
    "layout, row, meant",
    [
        ("demonstrations", {"prompt": "q", "completion": None}, True),
        ("demonstrations", {"prompt": "q"}, False),
        ("pairs", {"prompt": "q", "chosen": None, "rejected": None}, True),
        ("pairs", {"prompt": "q"}, False),
        ("rankings", {"prompt": "q", "answers": ["a"]}, True),
        ("labelled", {"prompt": "q", "label": "a"}, True),
        ("messages", {"messages": [USER]}, True),
        ("pairs", {}, True),
        ("transcripts", {"chosen": "no dialogue", "rejected": "none"}, True),
        ("transcripts", {"prompt": "q", "chosen": "a", "rejected": "b"}, False),
    ],
)
def test_a_faulty_row_is_told_from_another_layout(layout: Any, row: dict[str, Any], meant: bool) -> None:
    assert compatible(row, layout) is meant


def test_the_first_name_that_is_not_null_is_read() -> None:
    row = {"prompt": None, "question": "q"}
    assert value_of(row, "prompt", NAMES) == "q" and column_of(row, "prompt", NAMES) == "question"
    assert column_of({"prompt": None}, "prompt", NAMES) == "prompt" and column_of({}, "prompt", NAMES) is None


def test_columns_of_the_users_own_come_first() -> None:
    names = names_with({"completion": "gold", "prompt": "query_text"})
    assert detect({"query_text": "q", "gold": "a"}, names) == "demonstrations"
    assert value_of({"gold": "a", "completion": "b"}, "completion", names) == "a"
    with pytest.raises(ValueError, match="'prompts'"):
        names_with({"prompts": "x"})


def test_other_columns_are_those_that_the_record_does_not_read() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1, "source": "s", "answer": "kept", "n": 3}
    assert other_columns(row, "pairs") == {"source": "s", "answer": "kept", "n": 3}
    assert other_columns({"instruction": "q", "input": "i", "output": "a", "id": 1}, "demonstrations") == {"id": 1}


def test_a_ranking_gives_all_pairs_better_against_worse_with_margins() -> None:
    ranking = Ranking("q", ("a", "b", "c"), (1, 2, 3), Origin("f", 0, "s"), scores=(3.0, 2.5, 0.0), positions=(2, 0, 1), weight=2.0)
    pairs = ranking.pairs()
    assert [(pair.chosen, pair.rejected, pair.margin) for pair in pairs] == [("a", "b", 0.5), ("a", "c", 3.0), ("b", "c", 2.5)]
    assert {pair.weight for pair in pairs} == {2.0} and pairs[0].origin.where == "f, row 1"
    unscored = Ranking("q", ("a", "b"), (1, 2), Origin("f.jsonl", 4, "s"))
    assert unscored.pairs()[0].margin is None and unscored.origin.where == "f.jsonl:5"
