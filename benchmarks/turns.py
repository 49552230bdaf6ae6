"""Processes that run one PPO iteration each time they are told to, so that several can take turns on one machine."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from manifest import Manifest

OURS = Path(__file__).parent / "peers" / "ours_ppo.py"
NO_GPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


class Side:
    """A process that speaks the protocol of `peers/ours_ppo.py`.

    Args:
        command: starts it. device: cpu hides the GPUs from it.
    """

    def __init__(self, command: Sequence[str], device: str = "cpu") -> None:
        environment = os.environ | {"HF_HUB_OFFLINE": "1"} | (NO_GPU if device == "cpu" else {})
        environment.pop("OMP_NUM_THREADS", None)
        self.log: Any = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        self.process: Any = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )

    @functools.cached_property
    def manifest(self) -> Manifest:
        """Of its environment and its work; once it is there, the process is ready."""
        return Manifest(**self.read("MANIFEST"))

    def read(self, what: str) -> dict[str, Any]:
        """The next line of a kind.

        Raises:
            RuntimeError: the process ended; with what it said last.
        """
        for line in self.process.stdout:
            if line.startswith(what):
                found: dict[str, Any] = json.loads(line.removeprefix(what))
                return found
        self.log.seek(0)
        raise RuntimeError(f"{self.process.args} ended:\n{self.log.read()[-3000:]}")

    def iteration(self) -> dict[str, float]:
        """Seconds of one iteration, and of its phases."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read("ITERATION")

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()


def ours(job: Path, device: str) -> Side:
    """Our PPO loop on a job of `workload.write_job`."""
    return Side([sys.executable, str(OURS), str(job)], device)


def take_turns(
    sides: Mapping[str, Side], repeats: int, warm_up: int, after_round: Callable[[], None] = lambda: None
) -> dict[str, list[dict[str, float]]]:
    """One iteration of each side after the other, round by round; ends them. The first `warm_up` rounds are not kept.

    Args:
        after_round: called after every round, those of the warm-up too.

    Raises:
        RuntimeError: a side ended.
    """
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    try:
        for side in sides.values():
            _ = side.manifest  # all are ready before the first begins
        for repeat in range(repeats + warm_up):
            for name, side in sides.items():
                line = side.iteration()
                if repeat >= warm_up:
                    measured[name].append(line)
            after_round()
    finally:
        for side in sides.values():
            side.close()
    return measured
