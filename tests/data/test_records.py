"""One row into one prompt: ids, text, tokens, and every row that has none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_dist.config.data import DataSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.data.records import PromptReader, keep_end, source_files
from rlhf_dist.data.toy import write_toy

CHAT = [{"role": "user", "content": "Tom saw a dog"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(write_toy(tmp_path_factory.mktemp("toy"), seed=0).tokenizer)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}."
    return tokenizer


def reader(tokenizer: PreTrainedTokenizerBase, **changes: Any) -> PromptReader:
    return PromptReader(DataSection(train=["a.jsonl"], **changes), tokenizer)


def test_ids_are_63_bits_and_do_not_change() -> None:
    first, second, other = source_files(["a/x.jsonl", "b/x.jsonl", "a/y.jsonl"])
    assert [first.prompt_id(0), first.prompt_id(1), second.prompt_id(0)] == [5047935109311078331, 4670644825335443604, 233248369844204805]
    ids = {file.prompt_id(row) for file in (first, second, other) for row in range(5000)}
    assert len(ids) == 15_000 and all(0 <= i < 2**63 for i in ids)


def test_ids_survive_a_move() -> None:
    assert source_files(["/data/x.jsonl"])[0].prompt_id(3) == source_files(["elsewhere/x.jsonl"])[0].prompt_id(3)


def test_prompt_text_and_other_columns(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {"prompt": "Tom", "hero": "Tom", "messages": CHAT, "gone": None}
    assert reader(tokenizer).text(row, "a:1") == ("Tom", {"hero": "Tom", "messages": CHAT, "gone": None}, False)


@pytest.mark.parametrize("row", [{"messages": CHAT}, {"messages": CHAT, "prompt": None}])
def test_messages_where_the_prompt_is_absent(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> None:
    assert reader(tokenizer).text(row, "a:1") == ("<s>Tom saw a dog.", {"messages": CHAT}, True)


def test_named_fields(tokenizer: PreTrainedTokenizerBase) -> None:
    named = reader(tokenizer, prompt_field="question", messages_field="chat")
    assert named.text({"question": "Tom", "prompt": "kept"}, "") == ("Tom", {"prompt": "kept"}, False)
    assert named.text({"chat": CHAT}, "")[0] == "<s>Tom saw a dog."


def test_special_tokens_come_once(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = reader(tokenizer).tokens("Tom saw a dog.", templated=False, where="")
    templated = reader(tokenizer).tokens("<s>Tom saw a dog.", templated=True, where="")
    assert plain == templated and plain[0] == tokenizer.bos_token_id and plain[1] != tokenizer.bos_token_id


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "neither": ({"question": "Hi", "answer": "Yes"}, "neither 'prompt' nor 'messages' (its columns: question, answer)"),
    "nothing": ({}, "its columns: none"),
    "null": ({"prompt": None, "x": 1}, "'prompt' is null"),
    "null messages": ({"messages": None}, "'messages' is null"),
    "empty": ({"prompt": ""}, "the prompt is empty"),
    "number": ({"prompt": 7}, "the prompt is int, not text"),
    "list": ({"prompt": CHAT}, "the prompt is list, not text"),
    "empty messages": ({"messages": []}, "at least one message"),
}


@pytest.mark.parametrize("case", BAD)
def test_rows_without_a_prompt(tokenizer: PreTrainedTokenizerBase, case: str) -> None:
    row, what = BAD[case]
    with pytest.raises(UserError) as caught:
        reader(tokenizer).text(row, "a.jsonl:9")
    assert what in caught.value.what and caught.value.where == "a.jsonl:9" and caught.value.fix


def test_no_tokens_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="no tokens"):
        reader(tokenizer).tokens("", templated=True, where="a:1")


def test_overlong(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Tom saw a dog."
    tokens = reader(tokenizer).tokens(text, templated=False, where="")
    assert len(tokens) == 6
    for policy in ("error", "drop", "truncate_left"):
        assert reader(tokenizer, max_prompt_tokens=6, overlong=policy).fit(text, tokens, "a:1") == (text, tokens, "fits")
    with pytest.raises(UserError, match=r"has 6 tokens; data.max_prompt_tokens is 5"):
        reader(tokenizer, max_prompt_tokens=5).fit(text, tokens, "a:1")
    assert reader(tokenizer, max_prompt_tokens=5, overlong="drop").fit(text, tokens, "a:1")[2] == "dropped"
    assert reader(tokenizer, max_prompt_tokens=3, overlong="truncate_left").fit(text, tokens, "a:1") == (
        " dog.",
        (tokens[0], *tokens[4:]),
        "truncated",
    )


@given(tokens=st.lists(st.integers(2, 9), min_size=1, max_size=9), limit=st.integers(1, 9), bos=st.sampled_from([None, 0, 1]))
def test_a_start_token_stays_in_front_of_what_is_kept(tokens: list[int], limit: int, bos: int | None) -> None:
    started = (1, *tokens)
    limit = min(limit, len(tokens))  # one is always lost
    assert keep_end(tuple(tokens), limit, bos) == tuple(tokens[-limit:])
    with_start = (1, *tokens[len(tokens) - limit + 1 :])
    assert keep_end(started, limit, bos) == (with_start if bos == 1 and limit > 1 else tuple(tokens[-limit:]))


def test_a_prompt_cut_from_the_left_begins_as_the_model_expects(tokenizer: PreTrainedTokenizerBase) -> None:
    """Plain and templated; the text names no start token where that of a whole prompt names none."""
    cut = reader(tokenizer, max_prompt_tokens=3, overlong="truncate_left")
    for text, templated in (("Tom saw a dog.", False), ("<s>Tom saw a dog.", True)):
        tokens = cut.tokens(text, templated=templated, where="")
        shown, kept, _ = cut.fit(text, tokens, "a:1")
        assert kept == (tokenizer.bos_token_id, *tokens[-2:]) and shown == " dog."
