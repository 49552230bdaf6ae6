"""The polarity recipe: every sentence stands in one pair, no sentence on both sides, and its config takes what the script writes."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from rlhf_dist.config.loading import load_config
from rlhf_dist.config.reward_model import RewardModelConfig
from rlhf_dist.data.preferences import PreferenceReader
from rlhf_dist.rewards.function import load_function

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "recipes" / "polarity"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    import sys

    return sys.modules[load_function(f"{RECIPE / 'build_pairs.py'}:build").__module__]


def archive(folder: Path, liked: list[str], disliked: list[str]) -> Path:
    path = folder / "polarity.zip"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("data/rt-polarity.pos", "".join(f"{text} \n" for text in liked))
        made.writestr("data/rt-polarity.neg", "".join(f"{text} \n" for text in disliked))
    return path


def test_every_sentence_stands_in_one_pair_and_on_one_side(script: ModuleType, tmp_path: Path) -> None:
    liked, disliked = [f"good {n}" for n in range(50)], [f"bad {n}" for n in range(50)]
    path = archive(tmp_path, [*liked, liked[0], "both"], [*disliked, "both", disliked[3]])
    assert script.build(path, tmp_path / "out") == {"held_out": 10, "train": 40}
    sides = {
        name: [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()] for name in ("train", "held_out")
    }
    rows = sides["train"] + sides["held_out"]
    assert sorted(row["chosen"] for row in rows) == sorted(liked) and sorted(row["rejected"] for row in rows) == sorted(disliked)
    records = list(PreferenceReader([str(tmp_path / "out" / "train.jsonl")]))
    assert len(records) == 40 and {record.prompt for record in records} == {""}
    again = tmp_path / "again"
    script.build(path, again)
    assert (again / "train.jsonl").read_bytes() == (tmp_path / "out" / "train.jsonl").read_bytes()


def test_the_real_data_gives_as_many_pairs_as_its_page_says(script: ModuleType, shared: Path) -> None:
    rows = script.pairs(shared / "data" / "sentence-polarity" / "sentence_polarity.zip", 0)
    assert len(rows) == 5331 and f"{len(rows) - round(0.2 * len(rows)):,}" in (RECIPE / "README.md").read_text()


def test_the_config_reads_what_the_script_writes(script: ModuleType) -> None:
    config = load_config(RewardModelConfig, RECIPE / "reward.yaml")
    assert [*config.data.train, *config.data.eval] == ["runs/polarity/train.jsonl", "runs/polarity/held_out.jsonl"]
    assert RECIPE.parents[2] / "runs" / "polarity" == script.OUTPUT and config.data.eval_fraction == 0
