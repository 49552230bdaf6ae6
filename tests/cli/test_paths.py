from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.cli.paths import with_absolute_paths
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig


def config_of(ppo_values: dict[str, Any], **changes: Any) -> PPOConfig:
    return PPOConfig.model_validate(ppo_values | changes)


def test_relative_paths_start_at_the_base(ppo_values: dict[str, Any], tmp_path: Path) -> None:
    for name in ("policy", "reference", "classifier"):
        (tmp_path / name).mkdir()
    sources = [
        {"name": "f", "kind": "function", "path": "rewards/mine.py:score"},
        {"name": "m", "kind": "model", "model": "classifier"},
    ]
    config = config_of(
        ppo_values,
        run={"output_dir": "out"},
        data={"train": ["a.jsonl", "/b.jsonl"], "eval": "c.jsonl"},
        policy={"model": "policy", "deepspeed": "zero2.json"},
        reference={"model": "./reference"},
        reward={"sources": sources},
        rollout={"ranks": 1, "python": "venv/bin/python"},
        placement={"launcher": "ray"},
    )
    found = with_absolute_paths(config, tmp_path)
    assert found.rollout.python == str(tmp_path / "venv/bin/python")
    assert found.run.output_dir == str(tmp_path / "out")
    assert found.data.train == [str(tmp_path / "a.jsonl"), "/b.jsonl"] and found.data.eval == [str(tmp_path / "c.jsonl")]
    assert (found.policy.model, found.policy.deepspeed) == (str(tmp_path / "policy"), str(tmp_path / "zero2.json"))
    assert found.reference.model == str(tmp_path / "reference")
    assert found.reward.sources[0].path == f"{tmp_path / 'rewards/mine.py'}:score"  # type: ignore[union-attr]
    assert found.reward.sources[1].model == str(tmp_path / "classifier")  # type: ignore[union-attr]


def test_what_is_no_file_stays(ppo_values: dict[str, Any], tmp_path: Path) -> None:
    """Empty paths mean defaults, names of the hub are not folders, and modules are not files."""
    sources = [{"name": "f", "kind": "function", "path": "package.module:score"}, {"name": "m", "kind": "model", "model": "org/reward"}]
    found = with_absolute_paths(config_of(ppo_values, policy={"model": "org/model"}, reward={"sources": sources}), tmp_path)
    assert (found.policy.model, found.policy.deepspeed, found.value.model, found.reference.model) == ("org/model", "", "", "")
    assert found.reward.sources[0].path == "package.module:score"  # type: ignore[union-attr]
    assert found.reward.sources[1].model == "org/reward"  # type: ignore[union-attr]


def test_the_home_folder_and_the_current_one(ppo_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.chdir(tmp_path)
    found = with_absolute_paths(config_of(ppo_values, run={"output_dir": "~/runs"}, data={"train": "here.jsonl"}))
    assert found.run.output_dir == "/home/somebody/runs"
    assert found.data.train == [str(tmp_path / "here.jsonl")]


def test_nothing_else_changes(ppo_values: dict[str, Any]) -> None:
    config = config_of(ppo_values)
    assert with_absolute_paths(config, Path("/base")) == config  # all of its paths are absolute already


def test_an_endpoint_has_no_path(ppo_values: dict[str, Any], tmp_path: Path) -> None:
    source = {"name": "h", "kind": "http", "url": "http://127.0.0.1:1/score"}
    found = with_absolute_paths(config_of(ppo_values, reward={"sources": [source]}), tmp_path)
    assert found.reward.sources[0].url == source["url"]  # type: ignore[union-attr]


def test_the_home_of_nobody(ppo_values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such user"):
        with_absolute_paths(config_of(ppo_values, run={"output_dir": "~nobody-of-this-name/runs"}), tmp_path)
