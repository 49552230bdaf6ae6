"""Statistics of files, on made rows with known answers, on real ones, and within their memory."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf_dist.config.errors import UserError
from rlhf_dist.data.statistics import MAX_SOURCES, OTHER_SOURCES, collect
from rlhf_dist.data.validation import Reading


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_real_transcripts(shared: Path) -> None:
    report = collect([str(shared / "data" / "hh-rlhf" / f"{name}-base-test.jsonl.gz") for name in ("harmless", "helpful")], Reading())
    assert report.rows == 4666 and [file.counts.rows for file in report.files] == [2312, 2354]
    assert report.faults == {"chosen equals rejected": 2, "empty final turn": 8, "prompts differ": 14}
    assert report.characters["text"]["max"] == 4327 and report.characters["text"]["count"] == 2 * 4642
    assert {file.layout for file in report.files} == {"transcripts"} and report.overlaps[0].equal == 1


def test_lengths_labels_repeats(tmp_path: Path) -> None:
    rows = [
        {"prompt": "same", "response_a": "long", "response_b": "b", "label": "a", "source": "x"},
        {"prompt": "SAME ", "response_a": "long", "response_b": "bb", "label": "b", "source": "x"},
        {"prompt": "else", "response_a": "cc", "response_b": "dd", "label": "tie", "source": "y"},
        {"prompt": "else", "response_a": "cc", "response_b": "dd", "label": "tie", "source": "y"},
        {"prompt": "else", "response_a": "cc", "response_b": "dd", "label": "?", "source": "y"},
    ]
    report = collect([write(tmp_path / "x.jsonl", rows)], Reading())
    assert report.sources == {
        "x": {"rows": 2, "a": 1, "b": 1, "chosen longer": 1, "chosen shorter": 1},
        "y": {"rows": 2, "tie": 2, "equally long": 2},
    }
    assert (report.repeated_rows, report.distinct_prompts, report.near_prompts) == (1, 2, 0)
    assert report.characters["chosen"] == {"count": 4, "min": 2, "median": 2, "p90": 4, "max": 4, "mean": 2.5}
    assert report.characters["prompt"]["max"] == 5 and report.faults == {"label outside the options": 1} and not report.overlaps
    assert json.loads(json.dumps(report.as_dict()))["files"][0]["good"] == 4


def test_rankings_are_balanced_by_the_place_of_the_best(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "answers": ["a", "bb", "c"], "scores": [0, 2, 1]} for n in range(3)]
    report = collect([write(tmp_path / "x.jsonl", rows)], Reading())
    assert report.sources == {"x": {"rows": 3, "best at 2": 3}} and report.characters["answer"]["count"] == 9


def test_prompts_across_files_equal_and_near_with_places(tmp_path: Path) -> None:
    rng = random.Random(0)
    prompts = [" ".join(f"w{rng.randrange(9999)}" for _ in range(120)) for _ in range(30)]
    train = write(tmp_path / "train.jsonl", [{"prompt": ""}, *({"prompt": prompt} for prompt in prompts)])
    near = prompts[4] + " indeed"
    held = write(tmp_path / "eval.jsonl", [{"prompt": "own"}, {"prompt": prompts[2].upper()}, {"prompt": " "}, {"prompt": near}])
    report = collect([train, held], Reading())
    (overlap,) = report.overlaps
    assert (overlap.equal, overlap.near) == (1, 1) and overlap.examples == ((f"{train}:6", f"{held}:4"),)
    assert report.near_prompts == 0 and collect([held, held], Reading()).overlaps[0].equal == 3


def test_tokens_of_text_and_of_chats(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = write(tmp_path / "text.jsonl", [{"prompt": "w1 w2", "completion": "w3"}])
    tokens = collect([text], Reading(), tokenizer).tokens
    assert {part: summary["max"] for part, summary in tokens.items()} == {"prompt": 3, "completion": 1, "text": 4}
    chat = write(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]}])
    with pytest.raises(UserError, match="no chat template") as caught:
        collect([chat], Reading(), tokenizer)
    assert caught.value.where == f"{chat}:1"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} w9 {% endfor %}"
    assert collect([chat], Reading(), tokenizer).tokens["prompt"]["max"] == 3


def test_a_source_that_names_every_row_does_not_fill_the_memory(tmp_path: Path) -> None:
    report = collect([write(tmp_path / "x.jsonl", [{"prompt": f"q{n}", "source": f"s{n}"} for n in range(MAX_SOURCES + 9)])], Reading())
    assert len(report.sources) == MAX_SOURCES + 1 and report.sources[OTHER_SOURCES] == {"rows": 9}


@pytest.mark.slow
def test_a_row_stays_as_at_most_64_bytes(tmp_path: Path) -> None:
    """The slope of the peak: what is held whatever the size of the file (buffers, histograms) does not count."""
    rng, peaks, path = random.Random(0), [], tmp_path / "x.jsonl"
    for count in (2_000, 14_000):
        with path.open("w") as file:
            for n in range(count):
                row = {"prompt": f"{n} {rng.randrange(9**9)} word " * 2, "chosen": "a", "rejected": f"b{n}", "source": f"s{n % 3}"}
                file.write(json.dumps(row) + "\n")
        tracemalloc.start()
        assert collect([str(path)], Reading()).distinct_prompts == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 12_000 <= 64
