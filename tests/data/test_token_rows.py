"""Which tokens of a demonstration are trained on, and how rows become a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.config.errors import UserError
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
    row = DemonstrationEncoder(words, 2, "completion").encode(Demonstration("w1 w2", " w3 w4", HERE))
    assert texts(words, row) == ("<s> w1 w2 w3 w4 </s>", "w3 w4 </s>") and row.weight == 3 and len(row) == 6


def test_a_row_has_the_weight_of_its_record(words: Any) -> None:
    encoder = DemonstrationEncoder(words, 2, "completion")
    rows = [encoder.encode(Demonstration("w1 w2", " w3 w4", HERE, weight=weight)) for weight in (1.0, 2.5)]
    assert [row.weight for row in rows] == [3.0, 7.5] and rows[1].cut(5).weight == 5.0
    batch = collate_demonstrations(rows)
    assert batch.weight_B.tolist() == [1.0, 2.5] and batch.select([1]).weight_B.tolist() == [2.5]
    assert batch.valid_tokens_B.tolist() == [3, 3], "a weight changes no mask"


def test_all_means_all_but_the_first(words: Any) -> None:
    row = DemonstrationEncoder(words, 2, "all").encode(Demonstration("w1 w2", " w3", HERE))
    assert texts(words, row)[1] == "w1 w2 w3 </s>"


def test_an_end_that_stands_there_is_not_put_twice_and_may_be_absent(words: Any) -> None:
    assert texts(words, DemonstrationEncoder(words, 2, "completion").encode(Demonstration("w1", " w3 </s>", HERE)))[0] == "<s> w1 w3 </s>"
    assert texts(words, DemonstrationEncoder(words, None, "completion").encode(Demonstration("w1", " w3", HERE)))[0] == "<s> w1 w3"


def test_a_token_across_the_boundary_belongs_to_the_completion(words: Any) -> None:
    row = DemonstrationEncoder(words, 2, "completion").encode(Demonstration("w1 w", "2 w3", HERE))
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
    row = DemonstrationEncoder(words, 2, "completion").encode(record)
    kept = [token for token in texts(words, row)[1].split() if token.startswith("w")]
    assert kept == ["w2", "w3", "w5"]


def test_a_real_tokenizer_keeps_the_text_as_it_stands(shared: Path) -> None:
    tokenizer = load_tokenizer(str(shared / "models" / "stories15M"))
    row = DemonstrationEncoder(tokenizer, 2, "completion").encode(Demonstration("Question: 2+2?\nAnswer:", " four", HERE))
    whole, trained = texts(tokenizer, row)
    assert "Answer: four" in whole and trained.replace("</s>", "").strip() == "four" and row.tokens[-1] == 2


def test_a_dialogue_without_a_template_and_a_template_that_rewrites_are_refused(words: Any) -> None:
    turns = ({"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"})
    record = Demonstration(turns[:1], "w2", HERE, turns)
    words.chat_template = None
    with pytest.raises((UserError, ValueError), match="template"):
        DemonstrationEncoder(words, 2, "completion").encode(record)
    words.chat_template = "{{ messages|length }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(UserError, match="renders earlier turns anew"):
        DemonstrationEncoder(words, 2, "completion").encode(record)


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
