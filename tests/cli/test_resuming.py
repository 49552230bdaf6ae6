"""From which checkpoint a run may go on: the newest whole one of the same run, and none of a run that is over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.cli.resuming import resumable
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.progress import BufferedReporter
from rlhf_dist.runs.recorder import Recorder


@pytest.fixture
def recorder(ppo_values: dict[str, Any], tmp_path: Path) -> Recorder:
    made = Recorder(RunFolder.create(tmp_path, "run"))
    made.config(PPOConfig.model_validate(ppo_values))
    return made


def save(recorder: Recorder, step: int) -> Path:
    folder = Path(recorder.begin_checkpoint(step))
    (folder / "weights").write_text(f"after {step}")
    recorder.commit_checkpoint(step, {"step": step}, [], keep=3)
    return folder.with_name(f"step_{step:06d}")


def said(reporter: BufferedReporter) -> list[str]:
    return [event.arguments[0] for event in reporter.drain(0)]


def test_an_empty_folder_begins(recorder: Recorder, ppo_values: dict[str, Any]) -> None:
    reporter = BufferedReporter()
    assert resumable(PPOConfig.model_validate(ppo_values), recorder, reporter) is None and said(reporter) == []
    assert resumable(PPOConfig.model_validate(ppo_values), Recorder(None), reporter) is None


def test_the_newest_whole_one_is_taken_and_damage_is_told(recorder: Recorder, ppo_values: dict[str, Any]) -> None:
    save(recorder, 1)
    newest = save(recorder, 2)
    config, reporter = PPOConfig.model_validate(ppo_values), BufferedReporter()
    found = resumable(config, recorder, reporter)
    assert found is not None and found.step == 2 and said(reporter) == []
    (newest / "weights").write_text("after !")
    found = resumable(config, recorder, reporter)
    assert found is not None and found.step == 1
    assert said(reporter) == [
        "checkpoint step_000002 is damaged and not used: checkpoint file weights has other contents than were written, or cannot be read"
    ]


def test_settings_are_held_against_those_of_the_checkpoint(recorder: Recorder, ppo_values: dict[str, Any]) -> None:
    save(recorder, 1)
    reporter = BufferedReporter()
    other = PPOConfig.model_validate(ppo_values | {"checkpoint": {"keep": 7}})
    assert resumable(other, recorder, reporter) is not None
    assert said(reporter) == ["going on with another setting: checkpoint.keep: 2, now 7"]
    another = PPOConfig.model_validate(ppo_values | {"run": ppo_values["run"] | {"seed": 4}})
    with pytest.raises(UserError, match=r"other settings: run\.seed: 3, now 4"):
        resumable(another, recorder, BufferedReporter())


def test_a_run_that_is_over_stays_as_it_is(
    ppo_values: dict[str, Any], rlhf_dist_ppo: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Started again, as by a loop around the command, it ends well and does nothing."""
    root = rlhf_dist_ppo(ppo_values, "run.steps=1")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert rlhf_dist_ppo(ppo_values, "run.steps=1", "run.resume=auto") == root
    assert "the run is over already" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
