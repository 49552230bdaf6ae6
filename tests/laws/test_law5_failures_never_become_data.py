"""Law 5 for rewards: each way to fail under each rule. A failure is counted as promised and never becomes a number nobody asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.contracts.roles import RolloutInfo
from rlhf_dist.coordinator.judging import Judged, judge
from rlhf_dist.coordinator.shards import Shard
from rlhf_dist.rewards import guard
from rlhf_dist.rewards.mixture import RewardMixer
from rlhf_dist.runs.metrics import read_metrics
from rlhf_dist.runs.rollout_log import read_rollouts, write_rollouts
from rlhf_dist.workers.reward import RewardWorker

ROWS, GROUP, POISON = 6, 2, 3
HANG_S = 0.8

CODE = """
import time
def {name}(prompts, completions):
    with open({calls!r}, "a") as file:
        file.write(f"{{len(completions)}} ")
    scores = [1.0 + int(prompt[1:]) for prompt in prompts]
    if "poison" in completions:
        {fault}
    return scores
"""
FAULTS = {
    "raises": "raise ValueError('no answer in it')",
    "hangs": "time.sleep(99)",
    "nan": "scores[completions.index('poison')] = float('nan')",
    "length": "return scores[1:]",
    "string": "return 'a good one'",
}
KINDS = {"raises": "exception", "hangs": "timeout", "nan": "value", "length": "shape", "string": "shape"}
RULES: dict[str, dict[str, Any]] = {
    "raise": {},
    "retry": {"on_failure": "retry", "retries": 1},
    "drop_group": {"on_failure": "drop_group"},
    "default": {"on_failure": "default", "default": 0.25},
}


def samples() -> ExperienceBatch:
    """Three groups of two; the second sample of the second group is the one on which the reward fails."""
    tokens, mask, numbers = torch.ones(ROWS, 1, dtype=torch.long), torch.ones(ROWS, 1, dtype=torch.bool), torch.arange(ROWS)
    completions = tuple("poison" if row == POISON else f"c{row}" for row in range(ROWS))
    prompts = tuple(f"p{row}" for row in range(ROWS))
    versions = torch.zeros(ROWS, dtype=torch.long)
    return ExperienceBatch(
        tokens, mask, tokens, mask, mask, numbers // GROUP + 100, numbers % GROUP, versions, versions, -mask.float(), prompts, completions
    )


class Case:
    """One reward under one rule, from the worker to the rollout log."""

    def __init__(self, values: dict[str, Any], folder: Path, rank: Any, fault: str, rule: str) -> None:
        self.folder, self.calls = folder, folder / "calls"
        (folder / "rewards.py").write_text(CODE.format(name="r", fault=FAULTS[fault], calls=str(self.calls)))
        path, limit = f"{folder / 'rewards.py'}:r", HANG_S if fault == "hangs" else 30.0
        source = {"kind": "function", "name": "r", "path": path, "timeout_s": limit, "normalise": "scale", **RULES[rule]}
        config = PPOConfig.model_validate(values | {"reward": {"sources": [source]}})
        self.mixer = RewardMixer(config.reward, 9)
        self.worker = RewardWorker(config, rank)
        self.worker.quarantine_to(str(folder / "quarantine.jsonl"))

    def judged(self) -> Judged:
        batch = samples()
        ones = (1,) * ROWS
        info = RolloutInfo(
            tuple(batch.prompt_id_B.tolist()), tuple(batch.sample_index_B.tolist()), ones, ones, (0,) * ROWS, (0,) * ROWS, 0.0
        )
        shard = Shard(SimpleNamespace(payload=None, record=info), info=info)  # type: ignore[arg-type]
        shard.scores = [self.worker.judge(batch, "train", 5)]
        judged = judge(self.mixer, [shard], GROUP, update=True)
        write_rollouts(self.folder / "log.parquet", batch, judged.details())
        return judged

    def quarantined(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "quarantine.jsonl").read_text().splitlines()]

    def log(self) -> dict[str, list[Any]]:
        return read_rollouts(self.folder / "log.parquet").to_pydict()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "FIRST_PAUSE_S", 0.01)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_way_to_fail_under_every_rule(fault: str, rule: str, ppo_values: dict[str, Any], tmp_path: Path, plain_rank: Any) -> None:
    case = Case(ppo_values, tmp_path, plain_rank, fault, rule)
    if rule in ("raise", "retry"):
        with pytest.raises(UserError, match="reward 'r'"):
            case.judged()
        assert case.calls.read_text().split() == ["6"] * (1 if rule == "raise" else 2)
        assert not (tmp_path / "log.parquet").exists(), "what stopped the run is no sample"
        blamed = {line["sample_index"] + GROUP * (line["prompt_id"] - 100) for line in case.quarantined()}
        assert blamed == ({POISON} if fault == "nan" else set(range(ROWS))), "a call that fails as a whole blames nobody"
    else:
        judged, log = case.judged(), None
        log, metrics, (line,) = case.log(), judged.tally.means(), case.quarantined()
        others = [row for row in range(ROWS) if row != POISON]
        assert [log["reward/r"][row] for row in others] == [1.0 + row for row in others]
        assert 0.0 not in log["reward/r"] and 0.0 not in log["score"]
        assert metrics["rewards/r"] == pytest.approx(sum(1.0 + row for row in others) / 5) and metrics["rewards/r_abstained"] == 0
        assert case.mixer.state_dict()["r"]["count"] == 5, "what the reward did not judge never enters its running moments"
        assert (line["prompt_id"], line["sample_index"], line["completion"]) == (101, 1, "poison")
        assert metrics["rewards/r_timeouts"] == (case.calls.read_text().split().__len__() - 3 if fault == "hangs" else 0)
        if rule == "drop_group":
            assert log["reward/r"][POISON] is None and log["fate/r"] == ["judged"] * 3 + ["failed"] + ["judged"] * 2
            assert log["kept"] == [True, True, False, False, True, True] and log["score"][2:4] == [None, None]
            assert (metrics["rewards/r_failed"], metrics["rewards/dropped_failed"], metrics["rewards/dropped_samples"]) == (1, 2, 2)
        else:
            assert log["reward/r"][POISON] == 0.25 and log["fate/r"] == ["judged"] * 3 + ["defaulted"] + ["judged"] * 2
            assert all(log["kept"]) and all(map(math.isfinite, judged.scores)) and judged.genuine["r"][POISON] is None
            assert (metrics["rewards/r_defaulted"], metrics["rewards/dropped_samples"]) == (1, 0)
    lines = case.quarantined()
    assert {(line["stream"], line["step"], line["reward"], line["kind"]) for line in lines} == {("train", 5, "r", KINDS[fault])}
    assert all(("no answer in it" in line["traceback"]) == (fault == "raises") for line in lines)


def test_a_failure_that_passes_leaves_only_a_count(ppo_values: dict[str, Any], tmp_path: Path, plain_rank: Any) -> None:
    case = Case(ppo_values, tmp_path, plain_rank, "raises", "retry")
    (tmp_path / "rewards.py").write_text(
        "calls = []\ndef r(completions):\n    calls.append(1)\n    if len(calls) == 1: raise OSError\n    return [1.0] * len(completions)"
    )
    case.worker._rewards[0].close()  # type: ignore[union-attr]
    judged = case.judged()
    assert judged.raw["r"] == (1.0,) * ROWS and all(judged.keep)
    assert judged.tally.means()["rewards/r_retried"] == 1 and not (tmp_path / "quarantine.jsonl").exists()


def test_a_step_of_which_everything_failed_stops_the_run(ppo_values: dict[str, Any], tmp_path: Path, plain_rank: Any) -> None:
    case = Case(ppo_values, tmp_path, plain_rank, "raises", "drop_group")
    (tmp_path / "rewards.py").write_text("def r(completions): raise OSError")
    case.worker._rewards[0].close()  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"all 6 samples were dropped: .*reward 'r' failed on 6") as caught:
        case.judged()
    assert "quarantine.jsonl" in caught.value.fix and len(case.quarantined()) == ROWS


PICKY = """
def picky(prompts, completions, answer):
    if "w0" in answer:
        raise ValueError("cannot judge w0")
    return [0.5 + len(text) for text in completions]
"""


@pytest.mark.parametrize("rule", ["drop_group", "default"])
def test_a_whole_run_counts_what_failed(rule: str, ppo_values: dict[str, Any], tmp_path: Path, rlhf_dist_ppo: Any) -> None:
    (tmp_path / "picky.py").write_text(PICKY)
    source = {"kind": "function", "name": "picky", "path": f"{tmp_path / 'picky.py'}:picky", **RULES[rule]}
    ppo_values["reward"], ppo_values["data"]["eval_fraction"] = {"sources": [source]}, 0.0
    folder = rlhf_dist_ppo(ppo_values, "run.steps=1")
    (line,) = [line for line in read_metrics(folder / "metrics.jsonl") if "rewards/picky" in line]
    log = read_rollouts(folder / "rollouts" / "step_000001.parquet").to_pydict()
    assert line["rewards/picky_failed" if rule == "drop_group" else "rewards/picky_defaulted"] == 2
    assert log["kept"].count(False) == (2 if rule == "drop_group" else 0) and 0.0 not in log["reward/picky"]
    assert sorted(set(log["fate/picky"])) == (["failed", "judged"] if rule == "drop_group" else ["defaulted", "judged"])
