"""Demonstrations of both layouts through one reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.data.demonstrations import DemonstrationReader


def test_text_and_dialogues(tmp_path: Path) -> None:
    text, chat = tmp_path / "text.jsonl", tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    text.write_text(json.dumps({"prompt": "q", "completion": "a"}) + "\n")
    chat.write_text(json.dumps({"messages": turns}) + "\n")
    one, two = DemonstrationReader([str(text), str(chat)])
    assert (one.prompt, one.completion, one.turns) == ("q", "a", ())
    assert (two.prompt, two.completion, two.turns) == ((turns[0],), "a", tuple(turns))


def test_prompts_alone_and_pairs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    for row, layout in (({"prompt": "q"}, "prompts"), ({"prompt": "q", "chosen": "a", "rejected": "b"}, "pairs")):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=f"holds {layout}, not demonstrations") as caught:
            list(DemonstrationReader([str(path)]))
        assert "convert" in caught.value.fix


def test_real_demonstrations(shared: Path) -> None:
    tasks = list(DemonstrationReader([str(shared / "data" / "self-instruct" / "seed_tasks.jsonl")]))
    assert len(tasks) == 175 and tasks[1].prompt == "What is the relation between the given pairs?\n\nNight : Day :: Right : Left"
    sums = list(DemonstrationReader([str(shared / "data" / "gsm8k" / "test.jsonl")]))
    assert len(sums) == 1319 and sums[0].completion.endswith("#### 18")
