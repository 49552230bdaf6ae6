"""Which settings may change when a run goes on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.loading import dump_config
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.config.sft import SFTConfig
from rlhf_dist.runs.lineage import CONFIG, changed_keys, check_same_run


def changed(values: dict[str, Any], key: str, value: Any) -> PPOConfig:
    values = copy.deepcopy(values)
    *path, last = key.split(".")
    section: Any = values
    for name in path:
        section = section[int(name)] if isinstance(section, list) else section.setdefault(name, {})
    section[last] = value
    return PPOConfig.model_validate(values)


@pytest.fixture
def saved(ppo_values: dict[str, Any], tmp_path: Path) -> Path:
    (tmp_path / CONFIG).write_text(dump_config(PPOConfig.model_validate(ppo_values)))
    return tmp_path


def test_the_same_settings_are_the_same_run(saved: Path, ppo_values: dict[str, Any]) -> None:
    config = PPOConfig.model_validate(ppo_values)
    assert changed_keys(saved, config) == [] and check_same_run(saved, config) == []


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("policy.ranks", 2, "policy.ranks: 1, now 2"),
        ("policy.deepspeed", "zero3.json", "policy.deepspeed: '', now 'zero3.json'"),
        ("value.microbatch_tokens", 64, "value.microbatch_tokens: "),
        ("placement.restarts", 9, "placement.restarts: 3, now 9"),
        ("checkpoint.every", 3, "checkpoint.every: 10, now 3"),
        ("run.output_dir", "elsewhere", "run.output_dir: "),
        ("run.name", "copy", "run.name: 'test', now 'copy'"),
        ("rollout.slots", 4, "rollout.slots: 8, now 4"),
        ("reward.sources.0.start_timeout_s", 9.0, "reward.sources.0.start_timeout_s: 300.0, now 9.0"),
    ],
)
def test_where_and_how_the_work_is_cut_may_change_and_is_said(
    saved: Path, ppo_values: dict[str, Any], key: str, value: Any, said: str
) -> None:
    (change,) = check_same_run(saved, changed(ppo_values, key, value))
    assert change.startswith(said)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.seed", 4),
        ("run.steps", 3),
        ("policy.optim.lr", 0.1),
        ("policy.dtype", "bf16"),
        ("algorithm.minibatches", 4),
        ("rollout.max_staleness", 1),
        ("rollout.max_new_tokens", 5),
        ("data.max_prompt_tokens", 3),
        ("reward.sources.0.name", "odd"),
    ],
)
def test_what_decides_the_result_may_not(saved: Path, ppo_values: dict[str, Any], key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"other settings: .*{key}: ") as caught:
        check_same_run(saved, changed(ppo_values, key, value))
    assert caught.value.where == str(saved) and "new run" in caught.value.fix


def test_the_token_of_an_endpoint_may_come_from_elsewhere(tmp_path: Path, ppo_values: dict[str, Any]) -> None:
    ppo_values["reward"]["sources"] = [{"name": "judge", "kind": "http", "url": "http://host/score", "auth_env": "TOKEN"}]
    (tmp_path / CONFIG).write_text(dump_config(PPOConfig.model_validate(ppo_values)))
    config = changed(ppo_values, "reward.sources.0.auth_env", "TOKEN_2")
    assert check_same_run(tmp_path, config) == ["reward.sources.0.auth_env: 'TOKEN', now 'TOKEN_2'"]


@pytest.mark.parametrize(
    ("key", "value", "rounds"),
    [("placement.threads_per_rank", 2, True), ("policy.ranks", 2, True), ("placement.restarts", 9, False), ("checkpoint.every", 3, False)],
)
def test_what_takes_sums_in_another_order_is_said_to(saved: Path, ppo_values: dict[str, Any], key: str, value: Any, rounds: bool) -> None:
    (change,) = check_same_run(saved, changed(ppo_values, key, value))
    assert change.startswith(f"{key}: ") and change.endswith(" (the run goes on up to rounding)") == rounds


def test_how_many_steps_may_be_skipped_and_written_down_may_change_in_a_supervised_stage(tmp_path: Path) -> None:
    values: dict[str, Any] = {"data": {"train": "x"}, "model": {"model": "m"}}
    (tmp_path / CONFIG).write_text(dump_config(SFTConfig.model_validate(values)))
    other = SFTConfig.model_validate(values | {"training": {"max_skipped": 9, "capsules": 0}})
    assert check_same_run(tmp_path, other) == ["training.max_skipped: 3, now 9", "training.capsules: 2, now 0"]


def test_a_key_that_came_or_went_counts_as_a_change(saved: Path, ppo_values: dict[str, Any]) -> None:
    """A list that grew, and a setting of an older version."""
    ppo_values["reward"]["sources"] *= 2
    ppo_values["reward"]["sources"][1] = ppo_values["reward"]["sources"][0] | {"name": "second"}
    assert any(
        each.startswith("reward.sources.1.name: None, now 'second'") for each in changed_keys(saved, changed(ppo_values, "run.seed", 3))
    )
    old = yaml.safe_load((saved / CONFIG).read_text())
    old["run"]["gone"] = 1
    (saved / CONFIG).write_text(yaml.safe_dump(old))
    assert "run.gone: 1, now None" in changed_keys(saved, changed(ppo_values, "run.seed", 3))


@pytest.mark.parametrize("text", [None, "a: [", b"\xff\xfe"])
def test_a_saved_config_that_cannot_be_read_is_an_error(saved: Path, ppo_values: dict[str, Any], text: str | bytes | None) -> None:
    path = saved / CONFIG
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"config.yaml cannot be read") as caught:
        check_same_run(saved, PPOConfig.model_validate(ppo_values))
    assert caught.value.fix == "use another checkpoint"
