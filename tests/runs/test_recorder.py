from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_dist.config.loading import load_config
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.runs.checkpoints import CheckpointStore
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.metrics import read_metrics
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.runs.state import RunState


def test_everything_goes_to_its_place(tmp_path: Path, ppo_values: dict[str, Any]) -> None:
    folder = RunFolder.create(tmp_path, "run")
    recorder, config = Recorder(folder), PPOConfig.model_validate(ppo_values)
    recorder.config(config)
    recorder.metrics(3, {"objective/kl": 0.5})
    recorder.summary({"steps": 3})
    assert load_config(PPOConfig, folder.config) == config
    assert [(line["step"], line["objective/kl"]) for line in read_metrics(folder.metrics)] == [(3, 0.5)]
    assert json.loads(folder.summary.read_text()) == {"steps": 3}
    assert recorder.rollouts_path(3) == str(folder.rollouts / "step_000003.parquet")
    assert recorder.evaluation_path(0) == str(folder.evaluation / "step_000000.parquet")
    assert recorder.export_path("policy") == str(folder.export_policy) and recorder.export_path("value") == str(folder.export_value)
    assert recorder.report_path() == str(folder.report)
    assert recorder.capsule_path(3, "policy", 2) == str(folder.root / "capsules" / "step_000003_policy_02")
    recorder.close()
    recorder.close()
    assert folder.config.is_file()  # a run that recorded something keeps its folder


def test_checkpoints_are_committed_with_the_state_and_pruned(tmp_path: Path, ppo_values: dict[str, Any]) -> None:
    recorder = Recorder(RunFolder.create(tmp_path, "run"))
    for step in (1, 2, 3):
        (Path(recorder.begin_checkpoint(step)) / "weights").write_text(str(step))
        recorder.config(PPOConfig.model_validate(ppo_values))
        recorder.commit_checkpoint(step, RunState(step=step, kl_coef=0.25).to_dict(), [], keep=2)
    kept = CheckpointStore(tmp_path / "run" / "checkpoints").all()
    assert [checkpoint.step for checkpoint in kept] == [2, 3]
    assert RunState.from_dict(kept[-1].state) == RunState(step=3, kl_coef=0.25)


def test_a_rank_without_a_folder_writes_nothing(tmp_path: Path, ppo_values: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    recorder = Recorder(None)
    recorder.config(PPOConfig.model_validate(ppo_values))
    recorder.metrics(1, {"objective/kl": 0.5})
    recorder.commit_checkpoint(0, RunState().to_dict(), [], keep=1)
    recorder.rewind(0, 0)
    recorder.clear_partial()
    recorder.summary({})
    assert recorder.newest_checkpoint(print) is None and recorder.stuck("x", "y") == ""
    assert {
        recorder.report_path(),
        recorder.rollouts_path(1),
        recorder.evaluation_path(1),
        recorder.capsule_path(1, "policy", 1),
        recorder.begin_checkpoint(1),
        recorder.export_path("policy"),
    } == {""}
    recorder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_recorded_nothing_makes_room_for_the_next_try(tmp_path: Path, ppo_values: dict[str, Any]) -> None:
    recorder = Recorder(RunFolder.create(tmp_path, "run"))
    recorder.config(PPOConfig.model_validate(ppo_values))
    recorder.close()
    assert list((tmp_path / "run").iterdir()) == []
    recorder.close()
    RunFolder.create(tmp_path, "run", overwrite=False)
