"""Rows of preferences: both sides read, every row that is dropped or cut counted once, with its reason."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.supervised import RowsSection
from rlhf_dist.data.answers import AnswersEncoder
from rlhf_dist.models.loading import load_tokenizer
from rlhf_dist.workers.rows import preference_rows
from rlhf_dist.workers.supervised import Rows

PAD, BOS, EOS = 0, 1, 2
GOOD = [{"prompt": f"w{n}", "chosen": f" w{n} w1", "rejected": " w2"} for n in range(30)]
Read = Callable[..., Rows]


@pytest.fixture
def read(tiny_model: Path, tmp_path: Path) -> Read:
    """`read(rows, as_pairs, **section)` of a file of these rows; `eval_rows` make a second file."""
    encoder = AnswersEncoder(load_tokenizer(str(tiny_model)), (EOS,))

    def read(rows: list[dict[str, Any]], as_pairs: bool = False, eval_rows: list[dict[str, Any]] | None = None, **section: Any) -> Rows:
        for name, content in (("rows", rows), ("held_out", eval_rows or [])):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        given = {"train": str(tmp_path / "rows.jsonl"), "max_tokens": 32} | section
        if eval_rows is not None:
            given["eval"] = str(tmp_path / "held_out.jsonl")
        return preference_rows(RowsSection.model_validate(given), encoder, as_pairs=as_pairs, pad=PAD)

    return read


def test_pairs_carry_what_their_rows_say(read: Read) -> None:
    rows = [
        {"prompt": "w1", "chosen": " w2", "rejected": " w3 w4", "margin": 1.5, "weight": 2.0, "source": "alice"},
        {"prompt": "w1 ", "chosen": " w5", "rejected": " w6"},
        {"prompt": "w9", "chosen": " w5", "rejected": " w6", "p": 0.25},
    ]
    first, second, third = read(rows).train
    assert [answer.tokens.tolist() for answer in first.answers] == [[BOS, 5, 6, EOS], [BOS, 5, 7, 8, EOS]]
    assert (first.margin, first.weight, first.source, first.label_probability) == (1.5, 2.0, "alice", None)
    assert first.prompt == second.prompt != third.prompt, "white space does not make another prompt"
    assert third.label_probability == 0.25 and second.source.startswith("rows")


def test_a_labelled_tie_and_a_ranking(read: Read) -> None:
    (tie,) = read([{"prompt": "w1", "response_a": " w2", "response_b": " w3", "label": "tie"}]).train
    assert tie.label_probability == 0.5
    ranking = [{"prompt": "w1", "answers": [" w2", " w3", " w4"], "scores": [1, 5, 3]}]
    (whole,) = read(ranking).train
    assert [answer.tokens[2] for answer in whole.answers] == [7, 8, 6] and whole.margin is None
    pairs = read(ranking, as_pairs=True).train
    assert [pair.margin for pair in pairs] == [2.0, 4.0, 2.0] and len({pair.prompt for pair in pairs}) == 1


def test_no_prompt_stands_on_both_sides(read: Read) -> None:
    rows = read(GOOD + [row | {"chosen": " w9"} for row in GOOD], eval_fraction=0.4)
    train, held_out = ({row.prompt for row in side} for side in (rows.train, rows.evaluation))
    assert len(rows.train) + len(rows.evaluation) == 60 and not train & held_out and len(train | held_out) == 30


SHORT, LONG = (
    {"prompt": "w1 w2 w3", "chosen": " w1", "rejected": " w2"},
    {"prompt": "w1 w2 w3", "chosen": " w1 w2 w3 w4", "rejected": " w5"},
)
DROPS = {
    "chosen equals rejected": GOOD[0] | {"rejected": GOOD[0]["chosen"]},
    "empty completion": GOOD[0] | {"chosen": "  "},
    "null field": GOOD[0] | {"chosen": None},
    "wrong type": GOOD[0] | {"chosen": 3},
    "holds the pad token": GOOD[0] | {"chosen": " w1 <pad> w2"},
    "answers of the same tokens": GOOD[0] | {"chosen": " w1  w2", "rejected": " w1 w2"},
    "number out of range": GOOD[0] | {"weight": 0},
}


@pytest.mark.parametrize("reason", DROPS)
def test_every_drop_is_counted_by_its_reason(read: Read, reason: str) -> None:
    rows = read([*GOOD, DROPS[reason]], faults="drop")
    assert len(rows.train) == 30 and rows.fates == {f"dropped: {reason}": 1}


@pytest.mark.parametrize("reason", ["chosen equals rejected", "empty completion", "holds the pad token"])
def test_faults_stop_where_the_config_says_so(read: Read, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        read([*GOOD, DROPS[reason]])
    assert caught.value.where.endswith("rows.jsonl:31")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "w1", "answers": [" w1", " w2"], "ranks": [1, 1]}, "ties in the ranking"),
        ({"prompt": "w1", "answers": [" w1"], "ranks": [1]}, "one answer"),
        ({"prompt": "w1", "answers": [" w1", " w1"], "ranks": [1, 2]}, "equal answers"),
        ({"prompt": "w1", "answers": [" w1", "  w1"], "ranks": [1, 2]}, "answers of the same tokens"),
    ],
)
def test_faulty_rankings_are_counted(read: Read, row: dict[str, Any], reason: str) -> None:
    good = {"prompt": "w1", "answers": [" w2", " w3"], "ranks": [2, 1]}
    rows = read([good, row], faults="drop")
    assert len(rows.train) == 1 and rows.fates == {f"dropped: {reason}": 1}


def test_what_is_too_long(read: Read) -> None:
    """SHORT has 6 tokens, LONG 9 and 6: start, three words, the answer, end."""
    with pytest.raises(UserError, match="the row has 9 tokens, the limit is 8") as caught:
        read([SHORT, LONG], max_tokens=8)
    assert caught.value.where.endswith("rows.jsonl:2")
    dropped = read([SHORT, LONG], max_tokens=8, overlong="drop")
    assert len(dropped.train) == 1 and dropped.fates == {"dropped: longer than data.max_tokens": 1}
    cut = read([SHORT, LONG], max_tokens=8, overlong="truncate")
    assert cut.fates == {"cut: prompts shortened at the front to data.max_tokens": 1}
    assert [answer.tokens.tolist() for answer in cut.train[1].answers] == [[BOS, 6, 7, 5, 6, 7, 8, EOS], [BOS, 6, 7, 9, EOS]]
    nothing = read([SHORT, LONG], max_tokens=6, overlong="truncate")
    assert nothing.fates == {"dropped: an answer leaves no room for its prompt in data.max_tokens": 1}


def test_fates_are_told_by_side_and_faults_of_a_shared_file_once(read: Read) -> None:
    bad = DROPS["empty completion"]
    both = read([*GOOD, bad], eval_fraction=0.4, faults="drop")
    assert both.fates == {"dropped: empty completion": 1} and both.eval_fates == {}
    apart = read([*GOOD, bad, LONG], eval_rows=[SHORT, LONG, bad], max_tokens=8, overlong="drop", faults="drop")
    assert apart.fates == {"dropped: longer than data.max_tokens": 2, "dropped: empty completion": 2}
    assert apart.eval_fates == {"dropped: longer than data.max_tokens": 1, "dropped: empty completion": 1}
    assert (len(apart.train), len(apart.evaluation)) == (30, 1)


def test_pairs_of_other_stages_may_hold_the_pad(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(DROPS["holds the pad token"]).encode()))
    encoder = AnswersEncoder(load_tokenizer(str(tiny_model)), (EOS,))
    assert len(preference_rows(RowsSection(train=[str(path)]), encoder, as_pairs=True).train) == 1


STRICT = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def test_a_chat_that_the_template_refuses_is_a_fault_as_any_other(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    path = tmp_path / "rows.jsonl"
    chats = [[{"role": role, "content": f"w{n}"}] for n, role in enumerate(["user", "tool", "user", "tool", "user"])]
    path.write_text("".join(json.dumps({"prompt": chat, "chosen": "w2", "rejected": "w3"}) + "\n" for chat in chats))
    encoder, sections = AnswersEncoder(tokenizer, (EOS,)), [RowsSection(train=[str(path)], faults=faults) for faults in ("error", "drop")]
    tokenizer.chat_template = STRICT
    with pytest.raises(UserError, match="no tools here") as caught:
        preference_rows(sections[0], encoder, as_pairs=False)
    assert caught.value.where.endswith("rows.jsonl:2") and "data.faults=drop" in caught.value.fix
    rows = preference_rows(sections[1], encoder, as_pairs=False)
    assert len(rows.train) == 3 and rows.fates == {"dropped: refused by the chat template": 2}
    for template, message in ((None, "no chat template"), ("{{ messages", "is broken")):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=message):
            preference_rows(sections[1], encoder, as_pairs=False)
