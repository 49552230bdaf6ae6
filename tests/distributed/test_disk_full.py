"""A disk that fills up while a checkpoint is written: the one before stays whole, the message says so, and the run goes on from it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.runs.checkpoints import CheckpointStore
from rlhf_dist.runs.recorder import Recorder

LEFT = 16 * 1024
"""Bytes left on the full disk: enough for a line of metrics, not for weights."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of eight mebibytes of its own."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    free = os.statvfs(disk)
    ballast.write_bytes(b"\0" * (free.f_bavail * free.f_frsize - LEFT))
    return ballast


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_checkpoint_before_stays_whole(
    small_disk: Path,
    tiny_run: Callable[[Path], dict[str, Any]],
    rlhf_dist_ppo: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    asynchronous: bool,
) -> None:
    settings = ("run.steps=4", "checkpoint.every=1", f"checkpoint.asynchronous={asynchronous}", "evaluation.every=0")
    values = tiny_run(small_disk)
    begin = Recorder.begin_checkpoint

    def begin_on_a_full_disk(self: Recorder, step: int) -> str:
        if step == 3:
            fill(small_disk)
        return begin(self, step)

    whole = rlhf_dist_ppo(values | {"run": values["run"] | {"name": "whole"}}, *settings)
    monkeypatch.setattr(Recorder, "begin_checkpoint", begin_on_a_full_disk)
    with pytest.raises(SystemExit) as ended:
        rlhf_dist_ppo(values, *settings)
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert "disk is full" in said and "Traceback" not in said
    if asynchronous:  # the step that went on meanwhile found the disk full first
        assert "metrics.jsonl" in said and "run.resume=auto" in said
    else:
        assert "earlier checkpoints are untouched" in said and "step_000003" in said
    root = small_disk / "runs" / "test"
    refused: list[str] = []
    newest = CheckpointStore(root / "checkpoints").newest(refused.append)
    assert newest is not None and newest.step == 2 and not refused
    (small_disk / "ballast").unlink()
    monkeypatch.undo()
    rlhf_dist_ppo(values, *settings, "run.resume=auto")
    for role in ("policy", "value"):
        assert (root / "export" / role / "model.safetensors").read_bytes() == (whole / "export" / role / "model.safetensors").read_bytes()
