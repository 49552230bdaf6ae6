"""Which tokens of a demonstration are trained on, and how rows become a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.config.errors import UserError
from rlhf_dist.data.chat import RefusedChat
from rlhf_dist.data.layouts import Demonstration, Origin
from rlhf_dist.data.token_rows import DemonstrationEncoder, TokenRow, collate, collate_demonstrations
from rlhf_dist.models.loading import load_tokenizer

HERE = Origin("f.jsonl", 3, "f")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </{{ m['role'] }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture
def words(tiny_model: Path) -> Any:
    return load_tokenizer(str(tiny_model))


def texts(tokenizer: Any, row: TokenRow) -> tuple[str, str]:
    """What is there, and what is trained on."""
    return tokenizer.decode(row.tokens.tolist()), tokenizer.decode(row.tokens[row.trained].tolist())


def test_the_completion_and_its_end_are_trained_on(words: Any) -> None:
    row = DemonstrationEncoder(words, (2,), "completion").encode(Demonstration("w1 w2", " w3 w4", HERE))
    assert texts(words, row) == ("<s> w1 w2 w3 w4 </s>", "w3 w4 </s>") and row.weight == 3 and len(row) == 6


def test_a_row_has_the_weight_of_its_record(words: Any) -> None:
    encoder = DemonstrationEncoder(words, (2,), "completion")
    rows = [encoder.encode(Demonstration("w1 w2", " w3 w4", HERE, weight=weight)) for weight in (1.0, 2.5)]
    assert [row.weight for row in rows] == [3.0, 7.5] and rows[1].cut(5).weight == 5.0
    batch = collate_demonstrations(rows)
    assert batch.weight_B.tolist() == [1.0, 2.5] and batch.select([1]).weight_B.tolist() == [2.5]
    assert batch.valid_tokens_B.tolist() == [3, 3], "a weight changes no mask"


def test_all_means_all_but_the_first(words: Any) -> None:
    row = DemonstrationEncoder(words, (2,), "all").encode(Demonstration("w1 w2", " w3", HERE))
    assert texts(words, row)[1] == "w1 w2 w3 </s>"


def test_an_end_that_stands_there_is_not_put_twice_and_may_be_absent(words: Any) -> None:
    assert (
        texts(words, DemonstrationEncoder(words, (2,), "completion").encode(Demonstration("w1", " w3 </s>", HERE)))[0] == "<s> w1 w3 </s>"
    )
    assert texts(words, DemonstrationEncoder(words, (7, 9), "completion").encode(Demonstration("w1", " w3 w5 ", HERE)))[0].endswith("w3 w5")
    words.eos_token = None
    assert texts(words, DemonstrationEncoder(words, (), "completion").encode(Demonstration("w1", " w3", HERE)))[0] == "<s> w1 w3"
    row = DemonstrationEncoder(words, {40, 7}, "completion").encode(Demonstration("w1", " w4", HERE))
    assert row.tokens[-1] == 7, "the lowest stop token where there is no eos, whatever the order they come in"


def test_a_token_across_the_boundary_belongs_to_the_completion(words: Any) -> None:
    row = DemonstrationEncoder(words, (2,), "completion").encode(Demonstration("w1 w", "2 w3", HERE))
    assert texts(words, row)[1] == "w2 w3 </s>"


def test_every_turn_of_the_assistant_is_trained_on(words: Any) -> None:
    words.chat_template = TEMPLATE
    turns = (
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2 w3"},
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5"},
    )
    record = Demonstration(turns[:3], "w5", HERE, turns)
    row = DemonstrationEncoder(words, (2,), "completion").encode(record)
    kept = [token for token in texts(words, row)[1].split() if token.startswith("w")]
    assert kept == ["w2", "w3", "w5"]


def test_a_real_tokenizer_keeps_the_text_as_it_stands(shared: Path) -> None:
    tokenizer = load_tokenizer(str(shared / "models" / "stories15M"))
    row = DemonstrationEncoder(tokenizer, (2,), "completion").encode(Demonstration("Question: 2+2?\nAnswer:", " four", HERE))
    whole, trained = texts(tokenizer, row)
    assert "Answer: four" in whole and trained.replace("</s>", "").strip() == "four" and row.tokens[-1] == 2


PLAIN = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
THINKS = (  # as Qwen3 and R1 do: what was thought in earlier turns is cut
    "{% for m in messages %}{{ m['role'] }} {% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'].split('w9 ')[-1] }}{% endif %}"
    " </s> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
END_ONLY = PLAIN.replace("{% endfor %}", "{% if loop.last %}</s>{% endif %}{% endfor %}")
COUNTS = "{{ messages|length }} " + PLAIN
OPENS = PLAIN.replace("assistant {% endif %}", "assistant w9 {% endif %}")
STRICT = "{% if messages[1]['role'] == 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}" + PLAIN


def dialogue(*contents: str, roles: str = "ua") -> Demonstration:
    """Turns of the user and the assistant by turns."""
    names = {"u": "user", "a": "assistant"}
    turns = tuple({"role": names[roles[n % len(roles)]], "content": text} for n, text in enumerate(contents))
    return Demonstration(turns[:-1], contents[-1], HERE, turns)


def encoded(words: Any, template: str | None, record: Demonstration, loss_on: Any = "completion") -> TokenRow:
    words.chat_template = template
    return DemonstrationEncoder(words, (2,), loss_on).encode(record)


LONG = dialogue("w1", "w9 w2", "w3", "w9 w4")


@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "no chat template"), ("{% for m in messages %}{{ m", "is broken"), ("{{ messages[0].a.b }}", "is broken"), (STRICT, "refuses")],
)
def test_a_template_that_cannot_be_used_is_named_with_the_row(words: Any, template: str | None, message: str, loss_on: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        encoded(words, template, dialogue("w1", "w2", "w3", roles="uua"), loss_on)
    assert caught.value.where == HERE.where and isinstance(caught.value, RefusedChat) == (message == "refuses")


def test_a_template_that_cuts_earlier_turns_is_refused_and_both_remedies_work(words: Any) -> None:
    with pytest.raises(UserError, match="assistant turns before the last cannot be told apart") as caught:
        encoded(words, THINKS, LONG)
    assert "sft.loss_on=all" in caught.value.fix and "one answer each" in caught.value.fix
    whole = encoded(words, THINKS, LONG, "all")
    assert texts(words, whole)[0].split()[-4:] == ["<unk>", "w9", "w4", "</s>"] and whole.trained[1:].all()
    assert texts(words, encoded(words, THINKS, dialogue("w1", "w9 w2")))[1] == "w9 w2 </s>"


@pytest.mark.parametrize("template", [END_ONLY, COUNTS])
def test_a_template_that_renders_even_the_prompt_anew_leaves_the_remedies_that_work(words: Any, template: str) -> None:
    for record in (LONG, dialogue("w1", "w2")):
        with pytest.raises(UserError, match="renders earlier turns anew") as caught:
            encoded(words, template, record)
        assert "sft.loss_on=all" in caught.value.fix and "one answer" not in caught.value.fix
        assert encoded(words, template, record, "all").trained[1:].all()


def test_an_opening_that_the_answer_lacks_is_told_from_turns_rendered_anew(words: Any) -> None:
    with pytest.raises(UserError, match="asks for an answer with 'assistant w9 '") as caught:
        encoded(words, OPENS, dialogue("w1", "w2"))
    assert "let the answers begin" in caught.value.fix and "sft.loss_on=all" in caught.value.fix
    assert texts(words, encoded(words, OPENS, LONG))[1] == "w2 w4 </s>", "what the model is given it need not learn"
    assert encoded(words, OPENS, dialogue("w1", "w2"), "all").trained[1:].all()


def test_a_dialogue_that_the_assistant_opens_is_refused_where_answers_are_told_apart(words: Any) -> None:
    with pytest.raises(RefusedChat, match="begins with the assistant's turn"):
        encoded(words, PLAIN, dialogue("w1", "w2", "w3", roles="aua"))
    assert texts(words, encoded(words, PLAIN, dialogue("w1", "w2", "w3", roles="aua"), "all"))[1].endswith("w3 </s>")


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_a_dialogue_ends_as_a_rollout_does(words: Any, loss_on: str) -> None:
    """Given a stop token where the template writes none, nothing behind it where it does; earlier turns stay as they are."""
    bare = encoded(words, PLAIN, LONG, loss_on)
    assert bare.tokens[-1] == 2 and bare.trained[-1] and (bare.tokens == 2).sum() == 1
    words.add_tokens(["\n"])
    closed = encoded(words, THINKS.replace("</s> ", "</s> \n"), dialogue("w1", "w2"), loss_on)
    assert closed.tokens[-1] == 2 and closed.trained[-1] and (closed.tokens == 2).sum() == 2
    assert (closed.tokens == len(words) - 1).sum() == 1, "behind the user's turn"


@given(st.lists(st.tuples(st.integers(2, 9), st.integers(0, 2**9 - 1)), min_size=1, max_size=6))
def test_collating_loses_nothing(shapes: list[tuple[int, int]]) -> None:
    rows = []
    for number, (length, bits) in enumerate(shapes):
        trained = np.array([bool(bits >> i & 1) for i in range(length)])
        trained[0], trained[-1] = False, True
        rows.append(TokenRow(np.arange(1, length + 1, dtype=np.int32) + 10 * number, trained))
    batch = collate(rows)
    for number, row in enumerate(rows):
        prompt = batch.prompt_tokens_BP[number][batch.prompt_mask_BP[number]].tolist()
        response = batch.response_tokens_BT[number][batch.response_attention_BT[number]].tolist()
        assert prompt + response == row.tokens.tolist() and len(prompt) == int(row.trained.argmax())
        mask = batch.response_mask_BT[number][batch.response_attention_BT[number]].tolist()
        assert [False] * len(prompt) + mask == row.trained.tolist()
    assert int(batch.valid_tokens_B.sum()) == sum(row.weight for row in rows)


def test_a_row_without_a_trained_token_is_refused() -> None:
    with pytest.raises(ValueError, match="without a trained token"):
        collate([TokenRow(np.array([1, 2], dtype=np.int32), np.array([False, False]))])
