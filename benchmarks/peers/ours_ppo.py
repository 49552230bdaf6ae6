"""Our PPO loop in one plain process, one iteration a turn, with forced lengths: a side of against_trl.py, scaling.py and roofline.py.

It reads a job (JSON, `workload.write_job`) from its first argument, prints its manifest, and after each iteration prints a line of JSON
with its seconds, one with what it did (`likeness.py`), and waits for a line on standard input. What was sampled and in which minibatches it
was trained on stands in `samples.json` of the job's folder then, so that another side can train on the same. `overrides` of the job are
`key=value` of the config.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from likeness import SAMPLES, digest, model_facts, optimizer_facts, special_tokens
from manifest import manifest
from workload import write_config

from rlhf_dist.cli.programs import PPOProgram
from rlhf_dist.cli.spmd_launch import spmd_groups
from rlhf_dist.config.loading import load_config
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.coordinator.preflight import PROBE_STEP
from rlhf_dist.engines.deepspeed import DeepSpeedEngine
from rlhf_dist.engines.process import Rank, free_port, start_process_group
from rlhf_dist.models.quiet import quiet_libraries
from rlhf_dist.rollout.native import NativeEngine
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.progress import NullReporter
from rlhf_dist.runs.recorder import Recorder


class Watch:
    """Remembers what an iteration did: what was sampled, and what the trained engines were given."""

    def __init__(self) -> None:
        self.workers: dict[str, Any] = {}
        self.sampled: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.minibatches: dict[str, list[list[tuple[int, ...]]]] = {}
        self.tokens: dict[str, float] = {}
        self.losses: dict[str, list[float]] = {}
        self.steps: dict[str, list[Any]] = {}

    def clear(self) -> None:
        """An iteration begins."""
        for each in (self.sampled, self.minibatches, self.tokens, self.losses, self.steps):
            each.clear()

    def role(self, engine: Any) -> str:
        """Whose engine it is."""
        return next(name for name, worker in self.workers.items() if getattr(worker, "_engine", None) is engine)

    def did(self) -> dict[str, Any]:
        """The facts of `likeness`."""
        pairs = [(*prompt, len(completion)) for prompt, completion in self.sampled]
        return {
            "rows": len(pairs),
            "prompts": digest(prompt for prompt, _ in self.sampled),
            "completion_lengths": digest(pairs),
            "sampled_tokens": sum(len(completion) for _, completion in self.sampled),
            "special_tokens": special_tokens(completion for _, completion in self.sampled),
            "minibatches": {role: [digest(rows) for rows in found] for role, found in self.minibatches.items()},
            "trained_tokens": self.tokens,
            "optimizer_steps": {role: len(steps) for role, steps in self.steps.items()},
            "lr": {role: sorted({step.lr for step in steps}) for role, steps in self.steps.items()},
        }

    def result(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The results of `likeness`."""
        return {
            "surprise": metrics["objective/entropy"],
            "score": metrics["objective/rlhf_reward"] - metrics["objective/non_score_reward"],
            "kl": metrics["objective/kl"],
            "clipped": metrics["policy/clipfrac_avg"],
            "policy_loss": self.losses["policy"][0],
            "value_loss": self.losses["value"][0],
            "policy_gradient": self.steps["policy"][0].grad_norm,
            "value_gradient": self.steps["value"][0].grad_norm,
        }

    def leave(self, folder: Path) -> None:
        """Writes tokens and minibatches down, for a side that trains on the same."""
        order = [list(prompt) for rows in self.minibatches["policy"] for prompt in rows]
        rows = [[list(prompt), list(completion)] for prompt, completion in self.sampled]
        (folder / SAMPLES).write_text(json.dumps({"rows": rows, "order": order}), encoding="utf-8")


class WatchedPPO(PPOProgram):
    """PPO whose workers are known by role."""

    def __init__(self, config: PPOConfig, watch: Watch) -> None:
        super().__init__(config)
        self._watch = watch

    def factory(self, role: str) -> Callable[[Rank], Any]:
        """Makes the role's worker and remembers it."""
        build = super().factory(role)

        def built(rank: Rank) -> Any:
            worker = self._watch.workers[role] = build(rank)
            return worker

        return built


class Turns(NullReporter):
    """Says how long an iteration took and what it did, then waits for its turn."""

    def __init__(self, watch: Watch, folder: Path) -> None:
        self.began, self._watch, self._folder = 0.0, watch, folder

    def message(self, text: str) -> None:
        """Once the preflight has passed the first iteration may begin."""
        if text.startswith("preflight passed"):
            self.wait()

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """An iteration is over."""
        phases = {name.split("/")[1].removesuffix("_seconds"): value for name, value in metrics.items() if name.endswith("_seconds")}
        phases.pop("step", None)
        seconds, trained = time.perf_counter() - self.began, "value" in self._watch.steps
        if trained:
            self._watch.leave(self._folder)  # before the next side's turn begins
        print("ITERATION " + json.dumps({"seconds": seconds} | phases), flush=True)
        if trained:
            print("DID " + json.dumps({"did": self._watch.did(), "result": self._watch.result(metrics)}), flush=True)
        self.wait()

    def wait(self) -> None:
        """Blocks until the driver says so; a driver that is gone ends the run."""
        if not sys.stdin.readline():
            raise SystemExit("the driver has ended")
        self._watch.clear()
        self.began = time.perf_counter()


def main() -> None:
    """Runs the job."""
    quiet_libraries()
    import torch

    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    rank, watch = start_process_group(0, 1, 0, "127.0.0.1", free_port()), Watch()
    program = WatchedPPO(load_config(PPOConfig, write_config(job), job.get("overrides", ())), watch)
    watch_sampling(watch, job)
    watch_training(watch)
    with spmd_groups(program, rank) as groups:
        facts = manifest(
            "ours", work_of(program.config, watch), job["threads"], rank.device, warm_up=job["warm_up"], repeats=job["repeats"]
        )
        facts.settings.update(settings_of(program.config))
        print("MANIFEST " + json.dumps(dataclasses.asdict(facts)), flush=True)
        folder = RunFolder.create(job["folder"], "ours")
        program.run(groups, Recorder(folder), Turns(watch, Path(job["folder"])))


def work_of(config: PPOConfig, watch: Watch) -> dict[str, Any]:
    """What the manifest says of the work: the models as they were loaded, and the settings of the algorithm that change it."""
    models = {role: worker._engine.module.model for role, worker in watch.workers.items() if hasattr(worker, "_engine")}
    models["reward"] = next(iter(watch.workers["reward"]._engines.values())).module.model
    algorithm = config.algorithm
    return {
        "models": {role: model_facts(model) for role, model in models.items()},
        "optimizer": {
            role: optimizer_facts(watch.workers[role]._engine._engine.optimizer.param_groups)
            for role in ("policy", "value")
            if role in models
        },
        "epochs": algorithm.epochs,
        "minibatches": algorithm.minibatches,
        "gamma": algorithm.gamma,
        "lam": algorithm.lam,
        "kl_coef": algorithm.kl.coef,
        "clip": sorted({algorithm.clip_low, algorithm.clip_high}),
        "value_clip": algorithm.value_clip,
        "temperature": config.rollout.temperature,
        "whitens_advantages": algorithm.whitens_advantages,
        "whitens_rewards": algorithm.whiten_rewards,
        "longest_completion": config.rollout.max_new_tokens,
    }


def settings_of(config: PPOConfig) -> dict[str, Any]:
    """How our side does it, for the manifest."""
    trained = {"policy": config.policy, "value": config.value}
    return {
        "old_logprobs": config.algorithm.old_logprobs,
        "master_weights": "float32",
        "microbatch_tokens": {role: section.microbatch_tokens for role, section in trained.items()},
        "packing": {role: section.packing for role, section in trained.items()},
        "attention": {role: section.attention for role, section in trained.items()},
        "gradient_clip": {role: section.optim.clip_norm for role, section in trained.items()},
    }


def watch_sampling(watch: Watch, job: Mapping[str, Any]) -> None:
    """Every prompt gets its own limit and no stop token, so that all sides make the same number of tokens."""
    plain = NativeEngine.generate
    limits = {tuple(prompt): length for prompt, length in zip(job["prompts"], job["lengths"], strict=True)}

    def generate(self: Any, rows: Any, params: Any, key: Any) -> Any:
        forced = key.step != PROBE_STEP
        if forced:
            if len(rows) != len(limits):
                raise SystemExit(
                    f"the job forces {len(limits)} lengths at once, our config samples {len(rows)} rows: do not change the work"
                )
            rows = [dataclasses.replace(row, max_new_tokens=limits[tuple(row.prompt_tokens)]) for row in rows]
        completions, tally = plain(self, rows, dataclasses.replace(params, stop_tokens=()), key)
        if forced:
            watch.sampled += [(row.prompt_tokens, made.tokens) for row, made in zip(rows, completions, strict=True)]
        return completions, tally

    NativeEngine.generate = generate  # type: ignore[method-assign]


def watch_training(watch: Watch) -> None:
    """Notes minibatches, tokens and steps of the trained engines."""
    plain_backward, plain_step = DeepSpeedEngine.forward_backward, DeepSpeedEngine.optimizer_step

    def forward_backward(self: Any, microbatches: Any, objective: Any, denominator: float) -> Any:
        role = watch.role(self)
        prompts = [
            tuple(row[mask].tolist()) for part in microbatches for row, mask in zip(part.prompt_tokens_BP, part.prompt_mask_BP, strict=True)
        ]
        watch.minibatches.setdefault(role, []).append(prompts)
        watch.tokens[role] = watch.tokens.get(role, 0) + sum(int(part.response_mask_BT.sum()) for part in microbatches)
        tally = plain_backward(self, microbatches, objective, denominator)
        watch.losses.setdefault(role, []).append(tally.means()[f"loss/{role}_avg"])
        return tally

    def optimizer_step(self: Any) -> Any:
        info = plain_step(self)
        watch.steps.setdefault(watch.role(self), []).append(info)
        return info

    DeepSpeedEngine.forward_backward, DeepSpeedEngine.optimizer_step = forward_backward, optimizer_step  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
