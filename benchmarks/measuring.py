"""Clocks, peaks of memory, and processes of their own to measure in."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MIB = 2**20
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
"""With this in its environment a process gives back every tensor of a MiB or more that is freed: resident memory is then what is held."""


def here() -> str:
    """The device that the package would use: cuda or cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def now(device: str) -> float:
    """Seconds, with nothing left running on the device."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(device: str, reset: bool = False) -> float:
    """The most memory so far in MiB, since the last reset: allocated by torch on a GPU, resident on a CPU (Linux)."""
    import torch

    gc.collect()
    if device.startswith("cuda"):
        most = torch.cuda.max_memory_allocated() / MIB
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return most
    most = _status("VmHWM")
    if reset:
        ctypes.CDLL(None).malloc_trim(0)  # what loading has freed, the weights before they were quantised too, is given back first
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew at what is resident now
    return most


def held(device: str) -> float:
    """Memory in use now, in MiB, as `peak` counts it."""
    import torch

    return torch.cuda.memory_allocated() / MIB if device.startswith("cuda") else _status("VmRSS")


def in_a_process(script: str, job: Mapping[str, Any], threads: int, environment: Mapping[str, str] | None = None) -> Any:
    """What a script prints last, as JSON, when it is started with `--job` and the job in a fresh Python.

    Raises:
        SystemExit: the process failed; with the end of what it said.
    """
    return in_processes(script, [job], threads, environment)


def in_processes(script: str, jobs: list[Mapping[str, Any]], threads: int, environment: Mapping[str, str] | None = None) -> Any:
    """The same of several processes that run side by side, such as the ranks of a group; returns the answer of the first.

    Raises:
        SystemExit: one of them failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{number}.log" for number in range(len(jobs))]
        around = os.environ | {"OMP_NUM_THREADS": str(threads)} | dict(environment or {})
        started = [_start(script, job, around, log) for job, log in zip(jobs, logs, strict=True)]
        try:
            answers = [process.communicate()[0] for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
        for process, job, log in zip(started, jobs, logs, strict=True):
            if process.returncode:
                raise SystemExit(f"{Path(script).name} failed on {job}:\n{log.read_text(errors='replace')[-4000:]}")
        return json.loads(answers[0].strip().splitlines()[-1])


def _start(script: str, job: Mapping[str, Any], environment: Mapping[str, str], log: Path) -> subprocess.Popen[str]:
    with log.open("w") as errors:
        command = [sys.executable, script, "--job", json.dumps(job)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)


def _status(name: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{name}:")) / 1024
