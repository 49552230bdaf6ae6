from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.runs.lock import holding

OTHER = """
import sys, time
from pathlib import Path
from rlhf_dist.runs.lock import holding
with holding(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def other(root: Path, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", OTHER, str(root), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_run_in_the_same_folder_is_refused_by_who_is_there(tmp_path: Path) -> None:
    process = other(tmp_path / "runs" / "a", 60)
    try:
        with (
            pytest.raises(UserError, match=rf"a run is at work in this folder \(.*process {process.pid}\)"),
            holding(tmp_path / "runs" / "a"),
        ):
            pass
        with holding(tmp_path / "runs" / "b"), holding(tmp_path / "runs" / "a", "coordinator"):
            pass
    finally:
        process.kill()
        process.wait()
    with holding(tmp_path / "runs" / "a"):  # a process that was killed holds nothing
        assert not (tmp_path / "runs" / "a").exists(), "the lock lies beside the folder"


def test_one_that_is_ending_is_waited_for(tmp_path: Path) -> None:
    process = other(tmp_path / "run", 1.0)
    began = time.monotonic()
    with holding(tmp_path / "run", wait_s=30):
        assert 0.2 < time.monotonic() - began < 20
    process.wait()


def test_it_ends_with_the_block(tmp_path: Path) -> None:
    for _ in range(2):
        with holding(tmp_path / "run"):
            held = (tmp_path / ".run.run.lock").read_text()
            assert held.endswith(f"process {os.getpid()}")
