"""The stream is a function of position, the split one of the text, and no bad row or empty split gets past."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_dist.config.data import DataSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.data import prompts as prompts_module
from rlhf_dist.data.prompts import PromptRecord, PromptStream, check_prompts, held_out
from rlhf_dist.data.toy import write_toy

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
STORIES = SHARED / "models" / "stories260K"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(write_toy(tmp_path_factory.mktemp("toy"), seed=0).tokenizer)


def save(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(n: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"Tom saw {i}", "i": i, **columns} for i in range(n)]


def train(section: DataSection, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> PromptStream:
    return PromptStream(section, tokenizer, **({"split": "train", "seed": 0} | changes))


def order(records: list[PromptRecord]) -> list[int]:
    return [record.columns["i"] for record in records]


def test_a_record(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = save(tmp_path / "a.jsonl", [{"prompt": "Tom was", "hero": "Tom"}, {"prompt": "Mia was", "other": [1]}])
    first, second = train(DataSection(train=[path]), tokenizer).batch(0, 2)
    assert (first.text, first.columns, first.file, first.row) == ("Tom was", {"hero": "Tom", "other": None}, path, 0)
    assert first.tokens == tuple(tokenizer("Tom was").input_ids) and first.tokens[0] == tokenizer.bos_token_id
    assert (second.columns, second.row) == ({"hero": None, "other": [1]}, 1)
    assert first.prompt_id != second.prompt_id


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    buffer=st.integers(0, 12),
    seed=st.integers(0, 3),
    limit=st.none() | st.integers(1, 12),
    calls=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 10)), min_size=1, max_size=5),
)
def test_any_batch_is_a_slice_of_the_sequential_stream(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    sizes: list[int],
    buffer: int,
    seed: int,
    limit: int | None,
    calls: list[tuple[int, int]],
) -> None:
    paths = [save(tmp_path / f"{n}.jsonl", numbered(size)) for n, size in enumerate(sizes)]
    section = DataSection(train=paths, shuffle_buffer=buffer, max_prompt_tokens=4, overlong="drop")  # rows 10 and 11 are
    reader = train(section, tokenizer, seed=seed, limit=limit)
    sequence = [reader.batch(i, 1)[0] for i in range(100)]
    jumper = train(section, tokenizer, seed=seed, limit=limit)
    for start, count in calls:
        assert jumper.batch(start, count) == sequence[start : start + count]
        assert train(section, tokenizer, seed=seed, limit=limit).batch(start, count) == sequence[start : start + count]
    size = min(sum(min(size, 10) for size in sizes), limit or 99)
    epochs = [sequence[i : i + size] for i in range(0, 100 - size, size)]
    assert all({r.prompt_id for r in epoch} == {r.prompt_id for r in epochs[0]} for epoch in epochs)
    assert all(len({r.prompt_id for r in epoch}) == size for epoch in epochs)


def test_shuffling_follows_seed_and_epoch(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = save(tmp_path / "a.jsonl", numbered(30))
    section = DataSection(train=[path], shuffle_buffer=30)
    orders = [order(train(section, tokenizer, seed=seed).batch(start, 30)) for seed in (0, 1) for start in (0, 30)]
    assert len({tuple(o) for o in orders}) == 4 and all(sorted(o) == list(range(30)) for o in orders)
    assert order(list(train(section, tokenizer).finite())) == list(range(30))
    assert order(train(DataSection(train=[path]), tokenizer).batch(0, 60)) == [*range(30), *range(30)]


def test_limit_takes_the_first_of_the_files(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    section = DataSection(train=[save(tmp_path / "a.jsonl", numbered(30))], shuffle_buffer=30)
    stream = train(section, tokenizer, limit=4)
    assert sorted(order(stream.batch(0, 4))) == [0, 1, 2, 3]
    assert order(list(stream.finite())) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="limit"):
        train(section, tokenizer, limit=0)


def test_reading_on_reads_each_row_once(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    record = PromptStream._record
    monkeypatch.setattr(
        PromptStream, "_record", lambda self, file, number, row, counts: reads.append(number) or record(self, file, number, row, counts)
    )
    stream = train(DataSection(train=[save(tmp_path / "a.jsonl", numbered(40))]), tokenizer)
    for start in range(0, 40, 8):
        stream.batch(start, 8)
    assert reads == list(range(40))
    reads.clear()
    assert order(stream.batch(40_003, 1)) == [3]  # whole epochs are stepped over, not read
    assert len(reads) < 50


def test_negative_positions(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="positions start at 0"):
        train(DataSection(train=[save(tmp_path / "a.jsonl", numbered(2))]), tokenizer).batch(-1, 1)


def test_counts_of_an_epoch(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = save(tmp_path / "a.jsonl", numbered(12))  # 10 and 11 have one token more
    drop = train(DataSection(train=[path], max_prompt_tokens=4, overlong="drop"), tokenizer)
    assert order(drop.batch(0, 11)) == [*range(10), 0]
    assert (drop.accepted, drop.dropped, drop.truncated) == (2, 0, 0)  # the second epoch has begun, one row ahead
    assert [r.skipped for r in drop.batch(0, 11)] == [0] * 9 + [2, 0], "the last of an epoch knows what was dropped behind it"
    assert order(list(drop.finite())) == list(range(10))
    assert (drop.accepted, drop.dropped, drop.truncated) == (10, 2, 0)
    cut = train(DataSection(train=[path], max_prompt_tokens=4, overlong="truncate_left"), tokenizer)
    assert [len(r.tokens) for r in cut.finite()] == [4] * 12
    assert (cut.accepted, cut.dropped, cut.truncated) == (12, 0, 2)


def test_overlong_is_an_error_by_default(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = save(tmp_path / "a.jsonl", numbered(12))
    stream = train(DataSection(train=[path], max_prompt_tokens=4), tokenizer)
    assert len(stream.batch(0, 10)) == 10
    for _ in range(2):  # asked again, it fails again
        with pytest.raises(UserError, match=r"5 tokens; data.max_prompt_tokens is 4") as caught:
            stream.batch(10, 1)
        assert caught.value.where == f"{path}:11"
    assert order(stream.batch(0, 3)) == [0, 1, 2]


@pytest.mark.parametrize("use", [lambda s: s.batch(0, 1), lambda s: list(s.finite()), lambda s: s.check()])
def test_all_dropped_is_an_error_and_no_endless_loop(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Callable[[PromptStream], Any]
) -> None:
    section = DataSection(train=[save(tmp_path / "a.jsonl", numbered(5))], max_prompt_tokens=2, overlong="drop")
    with pytest.raises(UserError, match="all 5 train prompts"):
        use(train(section, tokenizer))


def test_bad_rows_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    good = {"prompt": "Tom was"}
    for bad in ({"question": "x"}, {"prompt": None}, {"prompt": ""}, {"prompt": 3}, {"messages": [{"role": "user", "content": "Hi"}]}):
        path = save(tmp_path / "a.jsonl", [good, good, bad])
        with pytest.raises(UserError) as caught:
            train(DataSection(train=[path]), tokenizer).batch(0, 3)
        assert caught.value.where == f"{path}:3" and caught.value.fix


def test_held_out_files(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    section = DataSection(train=[save(tmp_path / "t.jsonl", numbered(5))], eval=[save(tmp_path / "e.jsonl", numbered(3))], shuffle_buffer=9)
    held = train(section, tokenizer, split="eval")
    assert order(held.batch(0, 3)) == [0, 1, 2] == order(list(held.finite()))  # held-out prompts keep their order
    assert {r.file for r in held.finite()} == {section.eval[0]}
    assert len(list(train(section, tokenizer).finite())) == 5


def test_no_held_out_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="no held-out prompts"):
        train(DataSection(train=[save(tmp_path / "t.jsonl", numbered(5))]), tokenizer, split="eval")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fraction=st.floats(0.05, 0.95), picks=st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_the_split_goes_by_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, fraction: float, picks: list[int]) -> None:
    path = save(tmp_path / "a.jsonl", [{"prompt": f"Tom saw {pick}", "i": i} for i, pick in enumerate(picks)])
    section = DataSection(train=[path], eval_fraction=fraction)

    def texts(split: str) -> list[str]:
        try:
            return [r.text for r in train(section, tokenizer, split=split).finite()]
        except UserError as error:
            assert "split" in error.what
            return []

    learnt, held = texts("train"), texts("eval")
    assert len(learnt) + len(held) == len(picks)
    assert not set(learnt) & set(held)


def test_the_split_has_the_asked_share() -> None:
    assert abs(sum(held_out(f"prompt {i}", 0.2) for i in range(10_000)) - 2000) < 200  # five standard deviations
    assert [i for i in range(20) if held_out(f"prompt {i}", 0.2)] == GOLDEN_HELD_OUT


def test_formats_give_the_same_records(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = numbered(40, hero="Tom")
    table = pa.Table.from_pylist(rows)
    save(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    pa.csv.write_csv(table, tmp_path / "a.csv")
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    seen = [
        [(r.text, r.tokens, r.columns, r.row) for r in train(DataSection(train=[str(p)], shuffle_buffer=7), tokenizer).batch(3, 60)]
        for p in sorted(tmp_path.iterdir())
    ]
    assert len(seen) == 5 and all(s == seen[0] for s in seen)


def test_csv_prompts_that_look_like_numbers(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "a.csv").write_text("prompt,answer\n007,1\n12,2\n")
    records = list(train(DataSection(train=[str(tmp_path / "a.csv")]), tokenizer).finite())
    assert [(r.text, r.columns) for r in records] == [("007", {"answer": 1}), ("12", {"answer": 2})]


def test_check_counts_the_first_rows_of_every_file(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    big = save(tmp_path / "big.jsonl", numbered(100_000))
    section = DataSection(train=[big, save(tmp_path / "b.jsonl", numbered(3))], eval_fraction=0.25, max_prompt_tokens=4, overlong="drop")
    start = time.monotonic()
    counts = check_prompts(section, tokenizer)
    assert time.monotonic() - start < 2
    assert counts["train"].accepted + counts["eval"].accepted == 13  # 0 to 9 and 0 to 2
    assert counts["train"].dropped + counts["eval"].dropped == prompts_module.CHECK_ROWS - 10
    assert set(check_prompts(DataSection(train=[big]), tokenizer)) == {"train"}


def test_check_raises_before_training(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    good, bad = save(tmp_path / "good.jsonl", numbered(5)), save(tmp_path / "bad.jsonl", [*numbered(5), {"x": 1}])
    empty = save(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError) as caught:
        check_prompts(DataSection(train=[good, bad]), tokenizer)
    assert caught.value.where == f"{bad}:6"
    with pytest.raises(UserError, match="no rows"):
        check_prompts(DataSection(train=[good], eval=[empty]), tokenizer)
    with pytest.raises(UserError, match="falls into the eval split"):
        check_prompts(DataSection(train=[good], eval_fraction=1e-9), tokenizer)


def test_check_looks_further_for_a_rare_split(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "Tom saw 10 dog"}] * (prompts_module.CHECK_ROWS + 100) + [{"prompt": "Tom"}] * 2 + [{"x": 1}]
    section = DataSection(train=[save(tmp_path / "a.jsonl", rows)], max_prompt_tokens=4, overlong="drop")
    assert check_prompts(section, tokenizer)["train"].accepted == 2, "one, and the next that tells where its dropped rows end"
    monkeypatch.setattr(prompts_module, "SEARCH_ROWS", 100)
    with pytest.raises(UserError, match="all 100 train prompts in the first 100 rows"):
        check_prompts(section, tokenizer)


@pytest.mark.skipif(not STORIES.is_dir(), reason="the shared models folder is not here")
def test_real_prompts_and_chats() -> None:
    stories = AutoTokenizer.from_pretrained(STORIES)
    stories.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    data = SHARED / "data"
    section = DataSection(
        train=[str(data / "gsm8k" / "test.jsonl"), str(data / "oasst-en100" / "pairs.derived.jsonl")],
        prompt_field="question",
        eval_fraction=0.1,
        max_prompt_tokens=400,
        overlong="drop",
        shuffle_buffer=100,
    )
    learnt, held = train(section, stories), train(section, stories, split="eval")
    plain, chats = [], []
    for record in [*learnt.finite(), *held.finite()]:
        (chats if record.columns["messages"] is not None else plain).append(record)
    assert len(plain) + len(chats) + learnt.dropped + held.dropped == 1319 + 212
    assert learnt.dropped and plain and chats and not {r.text for r in learnt.finite()} & {r.text for r in held.finite()}
    assert all(r.tokens[0] == stories.bos_token_id and r.tokens[1] != stories.bos_token_id and len(r.tokens) <= 400 for r in plain + chats)
    assert all(r.text.endswith("assistant:") for r in chats) and all("answer" in r.columns for r in plain)
    assert train(section, stories).batch(500, 8) == list(islice(learnt.batch(495, 20), 5, 13))


GOLDEN_HELD_OUT = [0, 4, 9]


def test_every_record_has_every_column_of_the_first_rows_of_all_files(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """However a batch is cut, it has the same columns."""
    one = save(tmp_path / "a.jsonl", [{"prompt": "Tom was"}, {"prompt": "Mia was", "hero": "Mia"}, {"prompt": "Tom"}])
    two = save(tmp_path / "b.jsonl", [{"prompt": "Mia", "answer": 1}])
    records = train(DataSection(train=[one, two]), tokenizer).batch(0, 4)
    assert [r.columns for r in records] == [
        {"hero": None, "answer": None},
        {"hero": "Mia", "answer": None},
        {"hero": None, "answer": None},
        {"hero": None, "answer": 1},
    ]
    assert [train(DataSection(train=[one, two]), tokenizer).batch(n, 1)[0] for n in range(4)] == records


def test_a_column_that_comes_late_is_named_with_its_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts_module, "CHECK_ROWS", 3)
    path = save(tmp_path / "a.jsonl", [*numbered(3), {"prompt": "Tom", "i": 3, "hero": "Tom"}, {"prompt": "Tom", "i": 4}])
    stream = train(DataSection(train=[path]), tokenizer)
    assert order(stream.batch(0, 3)) == [0, 1, 2]
    with pytest.raises(UserError, match="column 'hero' comes first here") as caught:
        stream.batch(3, 1)
    assert caught.value.where == f"{path}:4" and "first 3 rows" in caught.value.fix
    monkeypatch.setattr(prompts_module, "CHECK_ROWS", 4)
    assert order(train(DataSection(train=[path]), tokenizer).batch(0, 5)) == [0, 1, 2, 3, 4]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    overlong=st.lists(st.lists(st.booleans(), min_size=1, max_size=8), min_size=1, max_size=3).filter(lambda x: not all(map(all, x))),
    buffer=st.integers(0, 12),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    epochs=st.integers(1, 3),
)
def test_counts_of_any_ranges_add_up_to_what_became_of_the_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, overlong: list[list[bool]], buffer: int, cuts: list[int], epochs: int
) -> None:
    """Every range is read by a stream of its own, as ranks do."""
    prompts = {True: "Tom saw a dog", False: "Tom"}
    paths = [save(tmp_path / f"{n}.jsonl", [{"prompt": prompts[long]} for long in file]) for n, file in enumerate(overlong)]
    long, rows = sum(map(sum, overlong)), sum(map(len, overlong))

    def counted(policy: str, total: int) -> tuple[int, int]:
        section = DataSection(train=paths, shuffle_buffer=buffer, max_prompt_tokens=4, overlong=policy)
        ends = sorted({0, total, *(cut for cut in cuts if cut < total)})
        ranges = [train(section, tokenizer).batch(a, b - a) for a, b in pairwise(ends)]
        return sum(r.skipped for part in ranges for r in part), sum(r.truncated for part in ranges for r in part)

    assert counted("drop", epochs * (rows - long)) == (epochs * long, 0)
    assert counted("truncate_left", epochs * rows) == (0, epochs * long)
