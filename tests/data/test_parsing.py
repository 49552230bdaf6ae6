"""Every supported row becomes its record, and every bad one names its reason."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.data.faults import Reason, RowFault
from rlhf_dist.data.layouts import Demonstration, Origin, PreferencePair, PromptOnly, Ranking
from rlhf_dist.data.parsing import messages_of, parse

ORIGIN = Origin("rows.jsonl", 6, "rows")
USER, OTHER = {"role": "user", "content": "q"}, {"role": "user", "content": "r"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def fault(layout: Any, row: dict[str, Any]) -> RowFault:
    with pytest.raises(RowFault) as caught:
        parse(row, layout, ORIGIN)
    assert caught.value.where == "rows.jsonl:7" and caught.value.detail
    return caught.value


def test_prompts_as_text_turns_and_questions() -> None:
    assert parse({"prompt": " q "}, "prompts", ORIGIN) == PromptOnly(" q ", ORIGIN)
    assert parse({"messages": [USER]}, "prompts", ORIGIN) == PromptOnly((USER,), ORIGIN)
    assert parse({"turns": ["q", "then"]}, "prompts", ORIGIN) == PromptOnly("q", ORIGIN, ("then",))


def test_demonstrations_of_every_form() -> None:
    assert parse({"prompt": "q", "completion": " a"}, "demonstrations", ORIGIN) == Demonstration("q", " a", ORIGIN)
    assert parse({"instruction": "q", "input": "i", "output": "a"}, "demonstrations", ORIGIN) == Demonstration("q\n\ni", "a", ORIGIN)
    row = {"instruction": "q", "instances": [{"input": "", "output": "a"}], "weight": 2}
    assert parse(row, "demonstrations", ORIGIN) == Demonstration("q", "a", ORIGIN, weight=2.0)
    chat = Demonstration((USER,), "a", ORIGIN, (USER, answer("a")))
    assert parse({"prompt": [USER], "completion": [answer("a")]}, "demonstrations", ORIGIN) == chat
    assert parse({"prompt": [USER], "completion": "a"}, "demonstrations", ORIGIN) == chat
    assert parse({"prompt": "q", "completion": [answer("a")]}, "demonstrations", ORIGIN) == chat


def test_a_dialogue_keeps_all_its_turns() -> None:
    turns = [{"role": "system", "content": "s"}, USER, answer("early"), OTHER, answer("late")]
    record = parse({"messages": turns, "source": "chat"}, "messages", ORIGIN)
    assert record == Demonstration(tuple(turns[:-1]), "late", Origin("rows.jsonl", 6, "chat"), tuple(turns))


def test_pairs_of_every_form() -> None:
    text = {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0.5, "p": 0.9}
    assert parse(text, "pairs", ORIGIN) == PreferencePair("q", "a", "b", ORIGIN, margin=0.5, label_probability=0.9)
    assert parse({"chosen": "a", "rejected": "b"}, "pairs", ORIGIN) == PreferencePair("", "a", "b", ORIGIN)
    chat = PreferencePair((USER,), "a", "b", ORIGIN)
    assert parse({"messages": [USER], "chosen": "a", "rejected": "b"}, "pairs", ORIGIN) == chat
    assert parse({"prompt": [USER], "chosen": [answer("a")], "rejected": [answer("b")]}, "pairs", ORIGIN) == chat
    assert parse({"messages": [USER], "chosen": [answer("a")], "rejected": [answer("b")]}, "pairs", ORIGIN) == chat
    assert parse({"prompt": "q", "chosen": [answer("a")], "rejected": [answer("b")]}, "pairs", ORIGIN) == chat
    whole = {"chosen": [USER, answer("a")], "rejected": [USER, answer("b")]}
    assert parse(whole, "pairs", ORIGIN) == chat and parse(whole | {"prompt": "q"}, "pairs", ORIGIN) == chat


@given(st.text(), st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip))
def test_prompt_and_answer_of_a_transcript_are_the_transcript(question: str, one: str, two: str) -> None:
    if one == two or "\n\nAssistant:" in one + two:
        return
    start = f"\n\nHuman: {question}\n\nAssistant:"
    pair = parse({"chosen": start + one, "rejected": start + two}, "transcripts", ORIGIN)
    assert isinstance(pair, PreferencePair)
    assert (pair.prompt, pair.chosen, pair.rejected) == (start, one, two)


def test_rankings_are_put_best_first() -> None:
    ranked = parse({"prompt": "q", "answers": ["a", "b", "c"], "ranks": [2, 3, 1]}, "rankings", ORIGIN)
    assert ranked == Ranking("q", ("c", "a", "b"), (1, 2, 3), ORIGIN, None, (2, 0, 1))
    scored = parse({"prompt": "q", "responses": ["a", "b", "c"], "scores": [0.5, 2, -1]}, "rankings", ORIGIN)
    assert scored == Ranking("q", ("b", "a", "c"), (1, 2, 3), ORIGIN, (2.0, 0.5, -1.0), (1, 0, 2))


@pytest.mark.parametrize(
    "label, chosen, preferred, probability",
    [
        ({"label": "A"}, "x", "a", None),
        ({"label": "b"}, "y", "b", None),
        ({"label": "tie"}, "x", "tie", 0.5),
        ({"p": 0.8}, "x", "a", 0.8),
        ({"p": 0.25}, "y", "b", 0.75),
        ({"p": 0.5}, "x", "tie", 0.5),
        ({"p": 0}, "y", "b", 1.0),
    ],
)
def test_labels_say_which_response_is_chosen(label: dict[str, Any], chosen: str, preferred: str, probability: float | None) -> None:
    pair = parse({"prompt": "q", "response_a": "x", "response_b": "y"} | label, "labelled", ORIGIN)
    assert isinstance(pair, PreferencePair)
    assert (pair.chosen, pair.preferred, pair.label_probability) == (chosen, preferred, probability)


PAIR, RANKING = {"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "answers": ["a", "b"], "ranks": [1, 2]}
LABELLED = {"prompt": "q", "response_a": "x", "response_b": "y", "label": "a"}
START = "\n\nHuman: q\n\nAssistant:"
BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("prompts", "missing field", {"text": "q"}),
    ("prompts", "null field", {"prompt": None}),
    ("prompts", "empty prompt", {"prompt": " \n"}),
    ("prompts", "wrong type", {"prompt": 3}),
    ("prompts", "wrong type", {"turns": [1]}),
    ("prompts", "nothing to answer", {"messages": [USER, answer("a")]}),
    ("prompts", "empty prompt", {"messages": [{"role": "user", "content": ""}]}),
    ("prompts", "wrong type", {"messages": [{"content": "no role"}]}),
    ("prompts", "null field", {"messages": [{"role": "user", "content": None}]}),
    ("demonstrations", "missing field", {"prompt": "q"}),
    ("demonstrations", "null field", {"prompt": "q", "completion": None}),
    ("demonstrations", "empty completion", {"prompt": "q", "completion": "  "}),
    ("demonstrations", "wrong type", {"prompt": "q", "completion": 4}),
    ("demonstrations", "number out of range", {"prompt": "q", "completion": "a", "weight": -1}),
    ("demonstrations", "number out of range", {"prompt": "q", "completion": "a", "weight": 0}),
    ("demonstrations", "number out of range", {"prompt": "q", "completion": "a", "weight": float("inf")}),
    ("demonstrations", "wrong type", {"prompt": "q", "completion": "a", "weight": float("nan")}),
    ("demonstrations", "several instances", {"instruction": "q", "instances": [{"output": "a"}, {"output": "b"}]}),
    ("demonstrations", "missing field", {"instruction": "q", "instances": [{"input": ""}]}),
    ("messages", "no final assistant turn", {"messages": [USER, answer("a"), OTHER]}),
    ("messages", "empty final turn", {"messages": [USER, answer(" ")]}),
    ("messages", "empty prompt", {"messages": [answer("a")]}),
    ("messages", "empty prompt", {"messages": [{"role": "user", "content": " "}, answer("a")]}),
    ("messages", "wrong type", {"messages": "text"}),
    ("pairs", "chosen equals rejected", PAIR | {"rejected": "a"}),
    ("pairs", "empty completion", PAIR | {"rejected": " "}),
    ("pairs", "missing field", {"prompt": "q", "chosen": "a"}),
    ("pairs", "null field", PAIR | {"rejected": None}),
    ("pairs", "wrong type", PAIR | {"rejected": 2}),
    ("pairs", "wrong type", PAIR | {"margin": "big"}),
    ("pairs", "number out of range", PAIR | {"margin": -0.5}),
    ("pairs", "label outside the options", PAIR | {"p": 1.5}),
    ("pairs", "prompts differ", {"chosen": [USER, answer("a")], "rejected": [OTHER, answer("b")]}),
    ("pairs", "prompts differ", {"prompt": "else", "chosen": [USER, answer("a")], "rejected": [USER, answer("b")]}),
    ("pairs", "empty final turn", {"chosen": [USER, answer("a")], "rejected": [USER, answer("")]}),
    ("pairs", "missing field", {"chosen": [answer("a")], "rejected": [answer("b")]}),
    ("transcripts", "prompts differ", {"chosen": START + " a", "rejected": "\n\nHuman: r\n\nAssistant: b"}),
    ("transcripts", "empty final turn", {"chosen": START + " ", "rejected": START + " b"}),
    ("transcripts", "chosen equals rejected", {"chosen": START + " a", "rejected": START + " a"}),
    ("transcripts", "no final assistant turn", {"chosen": "\n\nHuman: q", "rejected": START + " b"}),
    ("rankings", "ties in the ranking", RANKING | {"ranks": [1, 1]}),
    ("rankings", "one answer", RANKING | {"answers": ["a"], "ranks": [1]}),
    ("rankings", "one answer", RANKING | {"answers": [], "ranks": []}),
    ("rankings", "equal answers", RANKING | {"answers": ["a", "a"]}),
    ("rankings", "empty completion", RANKING | {"answers": ["a", ""]}),
    ("rankings", "ranks and answers differ in number", RANKING | {"ranks": [1]}),
    ("rankings", "missing field", {"prompt": "q", "answers": ["a", "b"]}),
    ("rankings", "wrong type", RANKING | {"ranks": [1, None]}),
    ("rankings", "wrong type", RANKING | {"ranks": [1, float("nan")]}),
    ("labelled", "label outside the options", LABELLED | {"label": "c"}),
    ("labelled", "label outside the options", LABELLED | {"label": 1}),
    ("labelled", "label outside the options", LABELLED | {"p": -0.1}),
    ("labelled", "label outside the options", LABELLED | {"p": float("nan")}),
    ("labelled", "null field", LABELLED | {"label": None}),
    ("labelled", "missing field", {"prompt": "q", "response_a": "x", "label": "a"}),
    ("labelled", "chosen equals rejected", LABELLED | {"response_b": "x"}),
    ("labelled", "empty completion", LABELLED | {"response_b": ""}),
]


@pytest.mark.parametrize("layout, reason, row", BAD)
def test_a_bad_row_names_its_reason(layout: str, reason: str, row: dict[str, Any]) -> None:
    assert fault(layout, row).reason == reason


def test_details_name_the_column() -> None:
    assert "'question' is null" in fault("prompts", {"question": None}).detail
    assert "text" in fault("prompts", {"text": "q"}).detail and "message 2" in fault("prompts", {"messages": [USER, 3]}).detail


def test_every_reason_of_a_row_is_tried() -> None:
    of_files = {"unreadable row", "mixed layouts", "refused by the chat template"}
    assert {reason for _, reason, _ in BAD} == set(get_args(Reason)) - of_files


def test_messages_as_arrow_and_vision_models_write_them() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages_of([{"role": "user", "content": parts, "name": None}], "it") == ({"role": "user", "content": "ab"},)
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert messages_of([call], "it") == ({"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]},)
    with pytest.raises(RowFault, match="not text"):
        messages_of([{"role": "user", "content": [{"type": "image"}]}], "it")
