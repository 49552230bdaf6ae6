"""Answers as tokens: they end as a rollout ends, share their prompt, and nothing is cut or dropped unsaid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_dist.config.errors import UserError
from rlhf_dist.data.answers import AnswersEncoder, AnswersRow, fitted
from rlhf_dist.data.chat import RefusedChat
from rlhf_dist.data.token_rows import TokenRow

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<end>", "user:", "bot:", *"abcdefgh"]
BOS, EOS, UNK, END = 1, 2, 3, 4
OPENING = "{% for m in messages %}{{ 'user: ' if m['role'] == 'user' else 'bot: ' }}{{ m['content'] }}"
CLOSED = OPENING + " <end>\n{% endfor %}{% if add_generation_prompt %}bot: {% endif %}"
OPEN = OPENING + " {% endfor %}{% if add_generation_prompt %}bot: {% endif %}"
REWRITES = "{{ messages | length }} " + CLOSED
STRICT = "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('no answers') }}{% endif %}" + CLOSED


def tokenizer(template: str | None = None, **special: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if "bos_token" not in special:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, **({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"} | special)
    )
    made.chat_template = template
    return made


def encode(prompt: Any, answer: str, template: str | None = None, stops: tuple[int, ...] = (EOS, END), **special: Any) -> TokenRow:
    return AnswersEncoder(tokenizer(template, **special), stops).encode(prompt, answer, where="here")


def words(row: TokenRow) -> str:
    return " ".join(WORDS[token] for token in row.tokens)


def answer(row: TokenRow) -> str:
    return " ".join(WORDS[token] for token in row.tokens[row.trained])


def row(length: int, prompt: int, first: int = BOS) -> TokenRow:
    """A row of numbers that tell where a token stood, seen from its end of the prompt."""
    tokens = np.array([first, *range(100 - prompt + 1, 100), *range(1000, 1000 + length - prompt)], np.int32)
    return TokenRow(tokens, np.arange(length) >= prompt)


def test_a_text_ends_with_the_stop_token() -> None:
    made = encode("a b", " c d")
    assert (words(made), answer(made)) == ("<s> a b c d </s>", "c d </s>")


def test_a_stop_token_that_is_there_is_not_doubled() -> None:
    assert words(encode("a b", " c </s>")) == "<s> a b c </s>"


def test_without_a_prompt_the_answer_stands_alone() -> None:
    made = encode("", "c d")
    assert (words(made), answer(made)) == ("<s> c d </s>", "c d </s>")


def test_without_an_eos_the_first_stop_token_ends_it() -> None:
    assert words(encode("a", " b", eos_token=None, stops=(6, END))) == "<s> a b <end>"
    assert words(encode("a", " b", eos_token=None, stops=())) == "<s> a b"


DIALOGUE = ({"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"})


def test_a_dialogue_ends_where_the_rollout_stops_and_not_at_the_templates_white_space() -> None:
    made = encode(DIALOGUE, "e f", CLOSED)
    assert words(made) == "user: a b <end> bot: c <end> user: d <end> bot: e f <end>"
    assert answer(made) == "e f <end>", "earlier answers belong to the prompt"


def test_a_template_that_ends_no_turn_gets_a_stop_token() -> None:
    made = encode(DIALOGUE[:1], "e f", OPEN)
    assert (words(made), answer(made)) == ("user: a b bot: e f </s>", "e f </s>")


def test_an_answer_that_spells_the_stop_token_is_not_cut_there() -> None:
    assert answer(encode(DIALOGUE[:1], "e </s> f", CLOSED)) == "e </s> f <end>"


OPENS = CLOSED.replace("}bot: {% endif", "}bot: f {% endif")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        (REWRITES, "renders earlier turns anew"),
        (STRICT, "no answers"),
        (OPENS, "asks for an answer with 'bot: f '"),
        ("{{ messages", "is broken"),
    ],
)
def test_a_template_that_cannot_be_used_is_named_with_the_row(template: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        encode(DIALOGUE[:1], "e", template)
    assert "here" in caught.value.where and "sft" not in caught.value.fix
    assert isinstance(caught.value, RefusedChat) == (template == STRICT)


def test_an_answer_that_begins_as_the_template_makes_the_model_begin() -> None:
    assert answer(encode(DIALOGUE[:1], "f e", OPENS)) == "e <end>"


def test_messages_may_hold_null_keys_and_text_in_parts() -> None:
    given = ({"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], "name": None},)
    assert words(encode(given, "e f", CLOSED)) == "user: a b <end> bot: e f <end>"


def test_an_eos_that_the_model_does_not_name_as_a_stop_is_not_doubled() -> None:
    assert words(encode(DIALOGUE[:1], "e", CLOSED.replace("<end>", "</s>"), stops=(END,))) == "user: a b </s> bot: e </s>"


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast, eos_token_id, bos_token_id = False, 2, 1

    with pytest.raises(UserError, match="no character offsets"):
        AnswersEncoder(Slow(), (2,))  # type: ignore[arg-type]


def test_a_row_costs_its_answers_with_their_padding() -> None:
    assert len(AnswersRow((row(7, 3), row(9, 3), row(5, 3)), 0, "s")) == 27


def test_what_fits_is_left_alone() -> None:
    rows = (row(7, 3), row(9, 3))
    assert fitted(rows, 9, "error", "here", BOS) == (rows, "")


def test_too_long_stops_or_is_dropped() -> None:
    with pytest.raises(UserError, match="the row has 9 tokens, the limit is 8") as caught:
        fitted([row(7, 3), row(9, 3)], 8, "error", "file:7", BOS)
    assert caught.value.where == "file:7"
    assert fitted([row(7, 3), row(9, 3)], 8, "drop", "here", BOS) == ((), "dropped: longer than data.max_tokens")


@given(
    prompt=st.integers(1, 30),
    answers=st.lists(st.integers(1, 20), min_size=2, max_size=4),
    limit=st.integers(2, 40),
    bos=st.sampled_from([BOS, None]),
)
def test_cut_rows_share_their_prompt_and_keep_start_and_answers(prompt: int, answers: list[int], limit: int, bos: int | None) -> None:
    rows = [row(prompt + length, prompt) for length in answers]
    cut, fate = fitted(rows, limit, "truncate", "here", bos)
    excess = prompt + max(answers) - limit
    if excess <= 0:
        assert cut == tuple(rows) and fate == ""
    elif prompt - excess < (2 if bos else 1):
        assert cut == () and fate.startswith("dropped: an answer leaves no room")
    else:
        assert fate.startswith("cut: prompts shortened at the front")
        assert max(map(len, cut)) == limit
        assert len({tuple(each.tokens[~each.trained]) for each in cut}) == 1, "all answers see the same prompt"
        for before, after in zip(rows, cut, strict=True):
            assert np.array_equal(after.tokens[after.trained], before.tokens[before.trained]), "no answer is cut"
            assert after.tokens[0] == (BOS if bos else before.tokens[excess])
            tail = after.tokens[~after.trained][1 if bos else 0 :]
            assert len(tail) and np.array_equal(tail, before.tokens[~before.trained][-len(tail) :]), "the prompt's end stays"


def test_a_start_token_that_not_all_rows_have_is_no_start_token() -> None:
    cut, _ = fitted([row(9, 6), row(8, 6, first=77)], 7, "truncate", "here", BOS)
    assert [int(each.tokens[0]) for each in cut] == [96, 96]


def test_the_longest_answer_decides_for_all() -> None:
    cut, _ = fitted([row(10, 8), row(14, 8)], 10, "truncate", "here", BOS)
    assert [len(each) for each in cut] == [6, 10]
