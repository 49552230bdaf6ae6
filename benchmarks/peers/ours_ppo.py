"""The other side of against_trl.py: our PPO loop in one plain process. See there, and trl_ppo.py, for the protocol."""

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

from rlhf_dist.cli.programs import PPOProgram
from rlhf_dist.cli.spmd_launch import spmd_groups
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.engines.process import free_port, start_process_group
from rlhf_dist.models.quiet import quiet_libraries
from rlhf_dist.rollout.native import NativeEngine
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.progress import NullReporter
from rlhf_dist.runs.recorder import Recorder

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


class Turns(NullReporter):
    """Says how long an iteration took, then waits for its turn."""

    def __init__(self) -> None:
        self.began = 0.0

    def message(self, text: str) -> None:
        """The preflight has passed: the first iteration may begin."""
        self.wait()

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """An iteration is over."""
        phases = {name.split("/")[1].removesuffix("_seconds"): value for name, value in metrics.items() if name.endswith("_seconds")}
        phases.pop("step", None)
        print("ITERATION " + json.dumps({"seconds": time.perf_counter() - self.began} | phases), flush=True)
        self.wait()

    def wait(self) -> None:
        """Blocks until the driver says so."""
        sys.stdin.readline()
        self.began = time.perf_counter()


def main() -> None:
    """Runs the job."""
    quiet_libraries()
    import torch

    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    rank = start_process_group(0, 1, 0, "127.0.0.1", free_port())
    program = PPOProgram(PPOConfig.model_validate(config(job)))
    force_lengths(job["lengths"])
    with spmd_groups(program, rank) as groups:
        facts = manifest("ours", job["workload"], job["threads"], "cpu")
        print("MANIFEST " + json.dumps(dataclasses.asdict(facts)), flush=True)
        folder = RunFolder.create(job["folder"], "ours")
        program.run(groups, Recorder(folder), Turns())


def config(job: Mapping[str, Any]) -> dict[str, Any]:
    """The run as a config: one PPO epoch of four minibatches, all models in one precision."""
    folder = Path(job["folder"])
    prompts = folder / "prompts.jsonl"
    text = [" ".join(f"t{token}" for token in prompt[1:]) for prompt in job["prompts"]]
    prompts.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in text))
    engine = {"dtype": DTYPES[job["dtype"]]}
    return {
        "run": {"steps": job["iterations"], "output_dir": str(folder), "name": "ours"},
        "data": {"train": str(prompts), "max_prompt_tokens": 64},
        "policy": {"model": job["policy"], "optim": {"lr": 1e-6}} | engine,
        "reference": engine,
        "value": {"optim": {"lr": 1e-6}} | engine,
        "reward": {"sources": [{"kind": "model", "name": "random", "model": job["scorer"]}]} | engine,
        "rollout": {"prompts_per_step": len(job["prompts"]), "max_new_tokens": max(job["lengths"]), "slots": len(job["prompts"])},
        # As TRL does it: the log-probs of sampling are the old ones.
        "algorithm": {"epochs": 1, "minibatches": job["minibatches"], "old_logprobs": "sampler"},
        "placement": {"launcher": "spmd", "threads_per_rank": job["threads"]},
    }


def force_lengths(lengths: list[int]) -> None:
    """Row i of a step gets its own limit and no stop token, so that both sides make the same number of tokens."""
    plain = NativeEngine.generate

    def generate(self: Any, rows: Any, params: Any, key: Any) -> Any:
        if len(rows) == len(lengths):
            rows = [dataclasses.replace(row, max_new_tokens=length) for row, length in zip(rows, lengths, strict=True)]
        return plain(self, rows, dataclasses.replace(params, stop_tokens=()), key)

    NativeEngine.generate = generate  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
