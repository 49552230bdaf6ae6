"""Our PPO loop in one plain process, one iteration a turn, with forced lengths: a side of against_trl.py, scaling.py and roofline.py.

It reads a job (JSON, `workload.write_job`) from its first argument, prints its manifest, and after each iteration prints a line of JSON
and waits for a line on standard input. `overrides` of the job are `key=value` of the config.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from manifest import manifest
from workload import write_config

from rlhf_dist.cli.programs import program_of
from rlhf_dist.cli.spmd_launch import spmd_groups
from rlhf_dist.config.loading import load_config
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.coordinator.preflight import PROBE_STEP
from rlhf_dist.engines.process import free_port, start_process_group
from rlhf_dist.models.quiet import quiet_libraries
from rlhf_dist.rollout.native import NativeEngine
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.progress import NullReporter
from rlhf_dist.runs.recorder import Recorder


class Turns(NullReporter):
    """Says how long an iteration took, then waits for its turn."""

    def __init__(self) -> None:
        self.began = 0.0

    def message(self, text: str) -> None:
        """Once the preflight has passed the first iteration may begin."""
        if text.startswith("preflight passed"):
            self.wait()

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """An iteration is over."""
        phases = {name.split("/")[1].removesuffix("_seconds"): value for name, value in metrics.items() if name.endswith("_seconds")}
        phases.pop("step", None)
        print("ITERATION " + json.dumps({"seconds": time.perf_counter() - self.began} | phases), flush=True)
        self.wait()

    def wait(self) -> None:
        """Blocks until the driver says so; a driver that is gone ends the run."""
        if not sys.stdin.readline():
            raise SystemExit("the driver has ended")
        self.began = time.perf_counter()


def main() -> None:
    """Runs the job."""
    quiet_libraries()
    import torch

    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    rank = start_process_group(0, 1, 0, "127.0.0.1", free_port())
    program = program_of(load_config(PPOConfig, write_config(job), job.get("overrides", ())))
    force_lengths(job["lengths"])
    with spmd_groups(program, rank) as groups:
        facts = manifest("ours", job["workload"], job["threads"], rank.device)
        print("MANIFEST " + json.dumps(dataclasses.asdict(facts)), flush=True)
        folder = RunFolder.create(job["folder"], "ours")
        program.run(groups, Recorder(folder), Turns())


def force_lengths(lengths: list[int]) -> None:
    """Row i of a step gets its own limit and no stop token, so that both sides make the same number of tokens."""
    plain = NativeEngine.generate

    def generate(self: Any, rows: Any, params: Any, key: Any) -> Any:
        if key.step != PROBE_STEP:
            if len(rows) != len(lengths):
                raise SystemExit(
                    f"the job forces {len(lengths)} lengths at once, our config samples {len(rows)} rows: do not change the work"
                )
            rows = [dataclasses.replace(row, max_new_tokens=length) for row, length in zip(rows, lengths, strict=True)]
        return plain(self, rows, dataclasses.replace(params, stop_tokens=()), key)

    NativeEngine.generate = generate  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
