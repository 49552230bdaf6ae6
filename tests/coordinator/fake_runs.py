"""Whole runs of the real coordinator over fake groups: started again until they come to their end, and held to an undisturbed run."""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.coordinator.ppo import PPOCoordinator
from rlhf_dist.coordinator.shards import Groups
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.metrics import read_metrics
from rlhf_dist.runs.progress import BufferedReporter
from rlhf_dist.runs.recorder import Recorder

STEPS, PROMPTS, SAMPLES = 5, 4, 2
SPENT = "recoveries did not get the run past"
KINDS = ("kill", "kill", "kill", "hang", "slow", "coordinator", "stop")
SAME = ("objective/", "rewards/", "rollout/", "eval/", "policy/version", "episode")
"""Metrics that no fault may change."""


@dataclass(frozen=True)
class Setting:
    """Of a run. How it is placed and kept may differ; what it computes depends on the staleness alone.

    rollout: transport to a rollout group; empty: the policy samples. reference: False: the policy speaks for it, as with LoRA.
    """

    staleness: int = 0
    rollout: str = ""
    ranks: int = 2
    shards: int = 1
    every: int = 1
    asynchronous: bool = True
    restarts: int = 3
    held_out: int = 0
    offload: str = "none"
    reference: bool = True


@dataclass
class Outcome:
    """What a run left behind: (ledger, weights) of both models, its metrics; and what it went through."""

    policy: Any
    value: Any
    lines: list[dict[str, Any]]
    counts: Counter[str]
    elapsed: float
    ends: list[str]
    said: list[str]
    reports: dict[str, str]


class Schedules:
    """Runs settings over faults, each until it has come to its end."""

    def __init__(self, fakes: SimpleNamespace, config: Callable[[Setting], PPOConfig]) -> None:
        self.fakes, self._config = fakes, config
        self.clean = functools.cache(self._clean)

    def _clean(self, staleness: int, held_out: int = 0) -> Outcome:
        """The same run without any fault."""
        return self.run(Setting(staleness, held_out=held_out), self.world(0))

    def world(self, seed: int, *given: Any, **named: Any) -> Any:
        return self.fakes.World(seed, self.fakes.MemoryDisk(), *given, **named)

    def run(self, setting: Setting, world: Any, folder: Path | None = None) -> Outcome:
        """Whoever started the run starts it again as long as it did not come to its end."""
        world.max_staleness, world.held_out = setting.staleness, setting.held_out
        memory = self.fakes.MemoryRecorder(world.disk)
        recorders = (lambda: memory) if folder is None else (lambda: Recorder(RunFolder.create(folder.parent, folder.name, resume=True)))
        ends, told = list[str](), list[str]()
        committed = -1
        while not ends or ends[-1] != "finished":
            assert len(ends) < 60, f"the run does not end: {ends}"
            recorder, reporter = recorders(), BufferedReporter()
            ends.append(self._attempt(setting, world, recorder, reporter))
            newest = recorder.newest_checkpoint(pytest.fail)
            step = -1 if newest is None else newest.step
            assert step >= committed, "what was committed is gone"
            committed = step
            said = [event.arguments[0] for event in reporter.drain(0) if event.method == "message"]
            told += said
            assert not [text for text in said if text.endswith("is saved") and f"after step {committed} is" not in text]
            assert not ends[-1].startswith("stopped") or ends[-1] == f"stopped {committed}", "it ended early without its state"
        lines = read_metrics(folder / "metrics.jsonl") if folder else [{"step": step} | line for step, line in memory.lines]
        final = [world.disk.read(f"{recorder.export_path(role)}/model") for role in ("policy", "value")]
        return Outcome(*final, lines, world.counts, world.now, [end.split()[0] for end in ends], told, memory.reports)

    def _attempt(self, setting: Setting, world: Any, recorder: Any, reporter: BufferedReporter) -> str:
        recorder.clear_partial()
        resume = recorder.newest_checkpoint(pytest.fail)
        groups, world.stopping = self._groups(setting, world), False
        try:
            result = PPOCoordinator(self._config(setting), groups, recorder, reporter, resume, lambda: world.stopping).run()
        except self.fakes.CoordinatorDied:
            return "died"
        except UserError as error:
            assert SPENT in error.what, f"the run ended otherwise: {error}"
            recorder.close()
            return "spent"
        finally:
            for group in groups.all():
                group.close()
        return f"stopped {result['stopped']}" if "stopped" in result else "finished"

    def _groups(self, setting: Setting, world: Any) -> Groups:
        fakes = self.fakes
        kinds = {"policy": fakes.FakePolicy, "value": fakes.Trained, "reward": fakes.FakeReward}
        kinds |= {"reference": fakes.FakeWorker} if setting.reference else {}
        kinds |= {"rollout": fakes.FakeRollout} if setting.rollout else {}
        return Groups(**{name: fakes.FakeGroup(world, name, setting.ranks, kind) for name, kind in kinds.items()})

    def check(self, setting: Setting, outcome: Outcome) -> None:
        """Every sample once, in order, of the version that the schedule says, and the same weights as without a fault."""
        k, clean = setting.staleness, self.clean(setting.staleness, setting.held_out)
        once = sorted((n // PROMPTS, n, sample) for n in range(STEPS * PROMPTS) for sample in range(SAMPLES))
        for (ledger, weights), (_, undisturbed) in ((outcome.policy, clean.policy), (outcome.value, clean.value)):
            trained = [sample for minibatch in ledger for sample, _ in minibatch]
            assert sorted(sample[1:4] for sample in trained) == once
            assert [sample[1] for sample in trained] == sorted(sample[1] for sample in trained)
            assert all(sample[4] == max(0, sample[1] - k) for sample in trained)
            assert weights == undisturbed
        lines = outcome.lines
        assert [line["step"] for line in lines] == list(range(STEPS + 1)), "each step is recorded once"
        assert [line["policy/version"] for line in lines[1:]] == list(range(1, STEPS + 1))
        assert [line["rollout/staleness_max"] for line in lines[1:]] == [min(step, k) for step in range(STEPS)]
        for line, same in zip(lines, clean.lines, strict=True):
            for name in same:
                assert not name.startswith(SAME) or math.isclose(line[name], same[name], rel_tol=1e-9, abs_tol=1e-12), name

    def drawn(self, seed: int, setting: Setting) -> Any:
        """A world with up to eight faults in about the time that a run takes."""
        rng, faults, length = random.Random(seed), list[Any](), self.clean(setting.staleness).elapsed
        roles = [role for role in ("policy", "value", "reward", "reference") if role != "reference" or setting.reference]
        roles += ["rollout"] * 2 if setting.rollout else []
        for _ in range(rng.randint(0, 8)):
            follows = faults and rng.random() < 0.4  # strikes while the run still recovers from another
            at = faults[-1].at + rng.uniform(0, 10) if follows else rng.uniform(0, 1.5 * length)
            role = faults[-1].group if follows and rng.random() < 0.5 else rng.choice(roles)
            late = rng.uniform(0.5, 2.5) * self.fakes.TIMEOUT
            faults.append(self.fakes.Fault(at, rng.choice(KINDS), role, rng.randrange(setting.ranks), rng.random() < 0.5, late))
        bad = {role: rng.randint(0, 1) for role in roles if rng.random() < 0.2}
        return self.world(seed, faults, bad, repeated=0.1)


def configs(base: dict[str, Any]) -> Callable[[Setting], PPOConfig]:
    """The config of a setting."""
    reward = {"sources": [base["reward"]["sources"][0] | {"normalise": "standardise"}]}  # moments that must not count a step twice

    @functools.cache
    def config(setting: Setting) -> PPOConfig:
        rollout = {"prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES, "max_new_tokens": 12}
        rollout |= {"max_staleness": setting.staleness, "shards_per_rank": setting.shards}
        rollout |= {"ranks": setting.ranks, "weight_sync": setting.rollout} if setting.rollout else {}
        sections = {
            "run": base["run"] | {"steps": STEPS},
            "rollout": rollout,
            "reward": reward,
            "algorithm": {"epochs": 1, "minibatches": 2, "kl": {"adaptive": True, "horizon": 100}},
            "checkpoint": {"every": setting.every, "asynchronous": setting.asynchronous},
            "placement": {"launcher": "ray", "restarts": setting.restarts, "offload": setting.offload},
            "evaluation": {"every": 2},
        }
        return PPOConfig.model_validate(base | sections)

    return config


def setting_of(seed: int, staleness: int, *, rollout: bool) -> Setting:
    """Everything else, drawn."""
    rng = random.Random(-1 - seed)
    return Setting(
        staleness,
        rng.choice(["broadcast", "object_store"]) if rollout else "",
        ranks=rng.randint(1, 2),
        shards=rng.randint(1, 2),
        every=rng.randint(1, 3),
        asynchronous=rng.random() < 0.7,
        restarts=rng.randint(0, 4),
        held_out=rng.choice([0, 0, 2]),
        offload="none" if staleness else rng.choice(["none", "idle"]),
        reference=rng.random() < 0.8,
    )
