"""The toy task is readable, reproducible, of the promised size, and leaves the reward something to move."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf_dist.config.data import DataSection
from rlhf_dist.data.prompts import PromptStream
from rlhf_dist.data.toy import HEROES, ToyTask, write_toy
from rlhf_dist.rewards.toy import kindness


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> ToyTask:
    return write_toy(tmp_path_factory.mktemp("toy") / "new" / "folder", seed=0)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_same_seed_same_bytes(task: ToyTask, tmp_path: Path) -> None:
    again, other = write_toy(tmp_path / "a", seed=0), write_toy(tmp_path / "b", seed=1)
    for name in ("corpus.jsonl", "pairs.jsonl", "prompts.jsonl", "held_out.jsonl", "tokenizer/tokenizer.json"):
        assert (task.corpus.parent / name).read_bytes() == (again.corpus.parent / name).read_bytes()
    assert other.corpus.read_bytes() != again.corpus.read_bytes()


def test_prompts_are_new_and_distinct(task: ToyTask) -> None:
    learnt, held, known = (
        {row["prompt"] for row in rows(task.prompts)},
        {row["prompt"] for row in rows(task.held_out)},
        {row["prompt"] for path in (task.corpus, task.pairs) for row in rows(path)},
    )
    assert (len(learnt), len(held)) == (200, 50)
    assert not learnt & held and not (learnt | held) & known
    assert all(row["hero"] in row["prompt"] and row["hero"] in HEROES for row in rows(task.prompts) + rows(task.held_out))


def test_moods(task: ToyTask) -> None:
    moods = Counter(row["mood"] for row in rows(task.corpus))
    assert abs(moods["kind"] / 6000 - 0.5) < 0.03 and abs(moods["cold"] / 6000 - 0.25) < 0.03


def test_the_text_is_english(task: ToyTask) -> None:
    for row in rows(task.corpus):
        text = row["prompt"] + row["completion"]
        assert text[0].isupper() and text.endswith(".") and "  " not in text and "{" not in text
        assert all(sentence[0].isupper() for sentence in text.split(". "))
        he, his = HEROES[row["hero"]]
        wrong = {"he", "his"} ^ {"she", "her"} ^ {he, his}
        assert not wrong & set(text.lower().replace(".", " ").split())


def test_the_tokenizer(task: ToyTask) -> None:
    tokenizer = AutoTokenizer.from_pretrained(task.tokenizer)
    assert len(tokenizer) < 400
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}) == 4
    for row in rows(task.corpus) + [{"prompt": row["prompt"], "completion": ""} for row in rows(task.prompts) + rows(task.held_out)]:
        text = row["prompt"] + row["completion"]
        whole = tokenizer(text)["input_ids"]
        assert whole[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in whole
        assert tokenizer.decode(whole, skip_special_tokens=True) == text
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        assert tokenizer(row["prompt"])["input_ids"] + completion == whole  # the cut between prompt and completion moves no token
        assert not completion or 10 <= len(completion) <= 25
    assert tokenizer("Tom saw a zebra.")["input_ids"].count(tokenizer.unk_token_id) == 1


def test_the_reward_has_headroom(task: ToyTask) -> None:
    corpus = rows(task.corpus)
    scores = kindness([r["prompt"] for r in corpus], [r["completion"] for r in corpus], hero=[r["hero"] for r in corpus])
    by_mood = {mood: mean(s for s, r in zip(scores, corpus, strict=True) if r["mood"] == mood) for mood in ("kind", "plain", "cold")}
    assert 0.3 < mean(scores) < 0.45
    assert max(scores) == pytest.approx(1.0) and sum(s > 0.95 for s in scores) > 100  # reached by text as it is
    assert by_mood["kind"] > 0.6 > 0.3 > by_mood["plain"] > by_mood["cold"]


def test_the_chosen_ending_is_the_kinder_one(task: ToyTask) -> None:
    pairs = rows(task.pairs)
    scores = {name: kindness([r["prompt"] for r in pairs], [r[name] for r in pairs]) for name in ("chosen", "rejected")}
    assert len(pairs) == 1500 and all(row["chosen"] != row["rejected"] for row in pairs)
    won = mean(float(better > worse) for better, worse in zip(scores["chosen"], scores["rejected"], strict=True))
    assert 0.7 < won < 0.9 and mean(scores["chosen"]) > mean(scores["rejected"]) + 0.25


def test_the_prompt_stream_reads_it(task: ToyTask) -> None:
    tokenizer = AutoTokenizer.from_pretrained(task.tokenizer)
    section = DataSection(train=[str(task.prompts)], eval=[str(task.held_out)], max_prompt_tokens=24)
    records = [
        *PromptStream(section, tokenizer, split="train", seed=0).finite(),
        *PromptStream(section, tokenizer, split="eval", seed=0).finite(),
    ]
    assert len(records) == 250 and all(set(r.columns) == {"hero"} for r in records)
