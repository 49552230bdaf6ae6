"""Rendering with a real template, and every way in which messages can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_dist.config.errors import UserError
from rlhf_dist.data.chat import render_messages
from rlhf_dist.data.files import iter_rows
from rlhf_dist.data.toy import write_toy

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
STORIES = SHARED / "models" / "stories260K"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% if m.name is defined %} by {{ m.name }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    task = write_toy(tmp_path_factory.mktemp("toy"), seed=0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(task.tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_renders_with_the_opening_of_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go"},
    ]
    assert render_messages(messages, tokenizer, where="f:1") == "<s><system>\n<user>Hi\n<assistant>Yes?\n<user>Go\n<assistant>"


def test_keys_that_are_none_are_as_absent(tokenizer: PreTrainedTokenizerBase) -> None:
    assert render_messages([{"role": "user", "content": "Hi", "name": None}], tokenizer, where="") == "<s><user>Hi\n<assistant>"
    assert render_messages([{"role": "user", "content": "Hi", "name": "Bo"}], tokenizer, where="") == "<s><user>Hi by Bo\n<assistant>"


def test_text_parts_are_joined(tokenizer: PreTrainedTokenizerBase) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert render_messages([{"role": "user", "content": parts}], tokenizer, where="") == "<s><user>one two\n<assistant>"


USER = {"role": "user", "content": "Hi"}
BAD: dict[str, tuple[Any, str]] = {
    "text": ("Hi", "must be a list"),
    "empty list": ([], "at least one message"),
    "null": (None, "must be a list"),
    "a string inside": ([USER, "Hi"], "must be an object, not str"),
    "no role": ([{"from": "human", "value": "Hi"}], "no role (its keys: from, value)"),
    "role is a number": ([{"role": 1, "content": "Hi"}], "no role"),
    "no content": ([{"role": "user"}], "content of the message is missing"),
    "content is a number": ([{"role": "user", "content": 7}], "content of the message is int"),
    "an image": ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "is list, not text"),
    "empty last": ([{"role": "user", "content": " \n"}], "last message is empty"),
    "assistant last": ([USER, {"role": "assistant", "content": "Hello"}], "nothing to answer"),
    "role the template refuses": ([{"role": "human", "content": "Hi"}], "unknown role human"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_messages(tokenizer: PreTrainedTokenizerBase, case: str) -> None:
    messages, what = BAD[case]
    with pytest.raises(UserError) as caught:
        render_messages(messages, tokenizer, where="chats.jsonl:7")
    assert what in caught.value.what
    assert caught.value.where.startswith("chats.jsonl:7") and caught.value.fix


def test_the_message_is_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError) as caught:
        render_messages([USER, {"role": "user"}], tokenizer, where="a:1")
    assert caught.value.where == "a:1, message 2"


def test_no_template(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="no chat template"):
        render_messages([USER], tokenizer, where="a:1")


@pytest.mark.skipif(not STORIES.is_dir(), reason="the shared models folder is not here")
def test_real_chats_on_a_real_tokenizer() -> None:
    stories = AutoTokenizer.from_pretrained(STORIES)
    stories.chat_template = TEMPLATE
    for number, row in iter_rows(str(SHARED / "data" / "oasst-en100" / "pairs.derived.jsonl")):
        text = render_messages(row["messages"], stories, where=str(number))
        assert text.startswith("<s><") and text.endswith("\n<assistant>")
        assert all(message["content"] in text for message in row["messages"])
