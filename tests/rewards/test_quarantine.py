"""Failed samples on file: whole lines from many processes at once, and enough in each to find the sample again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.contracts.reward import RewardFailure
from rlhf_dist.rewards.quarantine import Quarantine


def samples(rows: int) -> ExperienceBatch:
    tokens, mask, numbers = torch.zeros(rows, 1, dtype=torch.long), torch.ones(rows, 1, dtype=torch.bool), torch.arange(rows)
    texts = tuple(f"text {row} \N{SNOWMAN}\n\ud800" for row in range(rows))  # a lone surrogate, as a broken tokenizer may give
    return ExperienceBatch(tokens, mask, tokens, mask, mask, numbers + 2**60, numbers, numbers + 5, numbers, tokens.float(), texts, texts)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_all_there_is_to_know(tmp_path: Path) -> None:
    failure = RewardFailure("exception", "it raised", "f.py:3", "mend", "Traceback …", rows=3, of_call=True)
    Quarantine(str(tmp_path / "q.jsonl"), 1).add("r", samples(3), {2: failure}, "train", 7)
    (line,) = lines(tmp_path / "q.jsonl")
    assert line == {
        "stream": "train", "step": 7, "reward": "r", "rank": 1, "prompt_id": 2**60 + 2, "sample_index": 2, "policy_version": 7,
        "kind": "exception", "message": "it raised", "where": "f.py:3", "traceback": "Traceback …", "rows_of_call": 3, "call_failed": True,
        "prompt": "text 2 \N{SNOWMAN}\n\ud800", "completion": "text 2 \N{SNOWMAN}\n\ud800",
    }  # fmt: skip


def test_the_same_sample_failing_again_is_recognised(tmp_path: Path) -> None:
    quarantine = Quarantine(str(tmp_path / "q.jsonl"), 0)
    for message in ("first", "replayed"):
        quarantine.add("r", samples(2), {1: RewardFailure("timeout", message)}, "train", 3)
    keys = {(line["stream"], line["step"], line["prompt_id"], line["sample_index"]) for line in lines(tmp_path / "q.jsonl")}
    assert len(keys) == 1 and [line["message"] for line in lines(tmp_path / "q.jsonl")] == ["first", "replayed"]


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from rlhf_dist.contracts.reward import RewardFailure
from rlhf_dist.rewards.quarantine import Quarantine
from test_quarantine import samples
for step in range(200):
    failures = {0: RewardFailure("http", "x" * (step * 50)), 1: RewardFailure("http", "y")}
    Quarantine(sys.argv[1], 0).add("r", samples(2), failures, "eval", step)
"""


def test_ranks_do_not_tear_each_others_lines(tmp_path: Path) -> None:
    path, here = tmp_path / "q.jsonl", str(Path(__file__).parent)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), here]) for _ in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(lines(path)) == 800


def test_a_line_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere" / "q.jsonl", Path("/dev/full")):
        with pytest.raises(UserError, match="a failed sample cannot be written down") as caught:
            Quarantine(str(path), 0).add("r", samples(1), {0: RewardFailure("http", "x")}, "train", 0)
        assert caught.value.where == str(path)
