"""Law 6: nothing silent. What is dropped is counted, what is unknown is refused, what failed is no number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_dist.cli.main import main
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.loading import load_config
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.config.rewards import RewardSection
from rlhf_dist.contracts.experience import StopReason
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.rewards.mixture import RewardMixer
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.metrics import MetricsWriter, read_metrics
from rlhf_dist.runs.rollout_log import read_rollouts


def run(values: dict[str, Any], folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    main(["ppo", "--config", str(path)])
    return folder / "runs" / "test"


def test_dropped_prompts_are_counted(ppo_values: dict[str, Any], tmp_path: Path) -> None:
    """Prompts of 2 to 7 tokens (start token included) against a limit of 5."""
    ppo_values["data"] |= {"max_prompt_tokens": 5, "overlong": "drop", "eval_fraction": 0.0}
    folder = run(ppo_values, tmp_path)
    metrics = read_metrics(folder / "metrics.jsonl")
    assert [line["data/dropped_prompts"] for line in metrics[1:]] == [2.0, 4.0], "rows 4 and 5 of every six are too long"
    dropped = json.loads((folder / "summary.json").read_text())["dropped"]
    assert dropped == {"prompt longer than data.max_prompt_tokens": 6}


def test_samples_on_which_every_reward_abstains_are_counted_and_kept_in_the_log(ppo_values: dict[str, Any], tmp_path: Path) -> None:
    module = tmp_path / "choosy.py"
    module.write_text(
        "def choosy(prompts, completions, answer, **columns):\n    return [None if a in ('w0', 'w1') else 1.0 for a in answer]\n"
    )
    ppo_values["reward"] = {"sources": [{"name": "choosy", "kind": "function", "path": f"{module}:choosy"}]}
    ppo_values["data"]["eval_fraction"] = 0.0
    folder = run(ppo_values, tmp_path)
    assert json.loads((folder / "summary.json").read_text())["dropped"] == {"every reward abstained": 4}
    table = read_rollouts(folder / "rollouts" / "step_000001.parquet")
    assert table.num_rows == 16 and table.column("kept").to_pylist().count(False) == 4


def test_no_training_step_on_zero_samples() -> None:
    section = RewardSection.model_validate({"sources": [{"name": "r", "kind": "function", "path": "m:f"}]})
    with pytest.raises(UserError, match="all 2 samples were dropped"):
        RewardMixer(section, 8).mix({"r": [None, None]}, [1, 1], [StopReason.LENGTH] * 2, 1)


def test_an_unknown_key_is_refused_with_its_nearest_name(ppo_values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(ppo_values | {"rollouts": {}}))
    with pytest.raises(UserError, match="did you mean 'rollout'"):
        load_config(PPOConfig, path)


def test_a_metric_nobody_measured_is_absent_and_a_broken_one_is_an_error(tmp_path: Path) -> None:
    tally = Tally()
    tally.add("loss", 0.0, 0.0)
    assert tally.means() == {}
    writer = MetricsWriter(RunFolder.create(tmp_path, "run"))
    with pytest.raises(UserError, match="loss"):
        writer.write(1, {"loss": float("nan")})
    writer.close()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""
