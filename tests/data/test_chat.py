"""Rendering with a real template, and every way in which messages can be wrong."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_dist.config.errors import UserError
from rlhf_dist.data.chat import RefusedChat, render, render_answered, render_messages
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


def test_several_templates_without_a_default_are_none(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", {"default": TEMPLATE})
    assert render([USER], tokenizer, where="", ask=False) == "<s><user>Hi\n"
    monkeypatch.setattr(tokenizer, "chat_template", {"tool_use": TEMPLATE})
    with pytest.raises(UserError, match="no chat template"):
        render([USER], tokenizer, where="a:1", ask=False)


@pytest.mark.parametrize(
    "template",
    ["{% for m in messages %}{{ m.content", "{{ messages[0].content.nope.deeper }}", "{{ messages | nonsense }}"],
    ids=["syntax", "undefined", "no such filter"],
)
def test_a_broken_template_is_the_models_fault(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UserError, match="the chat template is broken: ") as caught:
        render([USER], tokenizer, where="a:1", ask=True)
    assert not isinstance(caught.value, RefusedChat) and "mend chat_template in the model folder" in caught.value.fix
    assert "roles" not in caught.value.fix and ("keys" in caught.value.fix) == ("nope" in template) and "\n" not in caught.value.what


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('not this one') }}", "{{ messages[0].content + 1 }}"], ids=["raised", "wrong type"]
)
def test_a_refused_chat_is_the_rows_fault(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(RefusedChat, match="refuses the messages") as caught:
        render([USER], tokenizer, where="a:1", ask=False)
    assert caught.value.where == "a:1" and "order roles" in caught.value.fix
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), RefusedChat), "it may come out of another process"


ANSWER = {"role": "assistant", "content": "Go"}


def test_the_answer_begins_behind_what_asks_for_it(tokenizer: PreTrainedTokenizerBase) -> None:
    text, start = render_answered([USER], ANSWER, tokenizer, where="")
    assert (text[:start], text[start:]) == ("<s><user>Hi\n<assistant>", "Go\n")


def test_why_an_answer_cannot_be_told_apart(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        TEMPLATE.replace("}<assistant>{", "}<assistant><think>{"): (
            "asks for an answer with '<assistant><think>'",
            "let the answers begin",
        ),
        "{{ messages | length }}" + TEMPLATE: ("renders earlier turns anew", "only appends"),
    }
    for template, (what, fix) in cases.items():
        monkeypatch.setattr(tokenizer, "chat_template", template)
        with pytest.raises(UserError, match=what) as caught:
            render_answered([USER], ANSWER, tokenizer, where="a:1", otherwise=", or give up")
        assert fix in caught.value.fix and caught.value.fix.endswith(", or give up") and caught.value.where == "a:1"
    with pytest.raises(RefusedChat, match="nothing asks"):
        render_answered([], ANSWER, tokenizer, where="a:1")


@pytest.mark.skipif(not STORIES.is_dir(), reason="the shared models folder is not here")
def test_real_chats_on_a_real_tokenizer() -> None:
    stories = AutoTokenizer.from_pretrained(STORIES)
    stories.chat_template = TEMPLATE
    for number, row in iter_rows(str(SHARED / "data" / "oasst-en100" / "pairs.derived.jsonl")):
        text = render_messages(row["messages"], stories, where=str(number))
        assert text.startswith("<s><") and text.endswith("\n<assistant>")
        assert all(message["content"] in text for message in row["messages"])
