"""What a launcher must know of a stage: what to check, which groups to start, what to run over them.

Checks and workers are imported where they are wanted: the coordinator's process runs the loop and loads no model.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from rlhf_dist.config.dpo import DPOConfig
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.config.reward_model import RewardModelConfig
from rlhf_dist.config.sft import SFTConfig
from rlhf_dist.coordinator.ppo import PPOCoordinator
from rlhf_dist.coordinator.shards import Groups
from rlhf_dist.engines.process import Rank
from rlhf_dist.runs.checkpoints import Checkpoint
from rlhf_dist.runs.progress import Reporter
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.training.dpo import DPO
from rlhf_dist.training.reward_model import REWARD
from rlhf_dist.training.sft import SFT
from rlhf_dist.training.supervised import Stage, SupervisedLoop
from rlhf_dist.workers.interpreter import check_interpreter
from rlhf_dist.workers.placement import Demand, demands
from rlhf_dist.workers.roles import ROLES, build_model, build_worker


def never() -> bool:
    """Nobody asks the run to stop."""
    return False


class Program(Protocol):
    """A stage, composed. Pickled to the coordinator's process under Ray, so it holds the config and nothing else."""

    config: Any
    sections: tuple[str, ...]
    """The config sections that have ranks."""
    loads_in_turn: bool
    """Whether a group loads only when those before it have, because they share devices by turns."""

    def check(self) -> Any:
        """Finds what can be found wrong before a process is started."""
        ...

    def demands(self) -> list[Demand]:
        """The groups it needs."""
        ...

    def factory(self, role: str) -> Callable[[Rank], Any]:
        """Makes a role's worker on a rank."""
        ...

    def run(
        self,
        groups: Mapping[str, Any],
        recorder: Recorder,
        reporter: Reporter,
        resume: Checkpoint | None = None,
        stopping: Callable[[], bool] = never,
    ) -> dict[str, Any]:
        """The stage over its groups, from a checkpoint if there is one; returns the summary, or `{"stopped": step}` where it was asked to
        end early."""
        ...


class PPOProgram:
    """PPO: up to four engine roles, a rollout group if the policy does not sample itself, and the coordinator."""

    sections = ROLES

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.loads_in_turn = config.placement.offload == "idle"

    def check(self) -> Any:
        """Models, data, rewards, DeepSpeed files, the interpreter of the rollout ranks."""
        from rlhf_dist.cli.checks import check_run

        facts = check_run(self.config)
        if self.config.rollout.python:
            check_interpreter(self.config.rollout.python)
        return facts

    def demands(self) -> list[Demand]:
        """A group a role."""
        return demands(self.config)

    def factory(self, role: str) -> Callable[[Rank], Any]:
        """The role's worker."""
        return functools.partial(build_worker, role, self.config)

    def run(
        self,
        groups: Mapping[str, Any],
        recorder: Recorder,
        reporter: Reporter,
        resume: Checkpoint | None = None,
        stopping: Callable[[], bool] = never,
    ) -> dict[str, Any]:
        """The PPO loop."""
        return PPOCoordinator(self.config, Groups(**groups), recorder, reporter, resume, stopping).run()


class SupervisedProgram(ABC):
    """A supervised stage: one role, one loop. Subclasses say what differs."""

    sections = ("model",)
    loads_in_turn = False
    stage: Stage

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def check(self) -> Any:
        """Model, data, DeepSpeed file."""

    def demands(self) -> list[Demand]:
        """The one group."""
        section = self.config.model
        return [Demand("model", section.ranks, section.cpus_per_rank, section.gpus_per_rank, self.config.placement.strategy)]

    def factory(self, role: str) -> Callable[[Rank], Any]:
        """The one worker."""
        return functools.partial(build_model, self.config)

    def run(
        self,
        groups: Mapping[str, Any],
        recorder: Recorder,
        reporter: Reporter,
        resume: Checkpoint | None = None,
        stopping: Callable[[], bool] = never,
    ) -> dict[str, Any]:
        """The supervised loop, with the phases of the stage."""
        return SupervisedLoop(self.stage, self.config, groups["model"], recorder, reporter, resume, stopping).run()


class SFTProgram(SupervisedProgram):
    """Supervised fine-tuning."""

    stage = SFT

    def check(self) -> Any:
        """Model, data, DeepSpeed file."""
        from rlhf_dist.cli.sft_checks import check_sft

        return check_sft(self.config)


class RewardProgram(SupervisedProgram):
    """Training of a reward model; it reports at the end."""

    stage = REWARD

    def check(self) -> Any:
        """Model, data, DeepSpeed file."""
        from rlhf_dist.cli.reward_checks import check_reward_model

        return check_reward_model(self.config)


class DPOProgram(SupervisedProgram):
    """Direct preference optimisation; the reference is asked before the first step."""

    stage = DPO

    def check(self) -> Any:
        """Model, data, DeepSpeed file."""
        from rlhf_dist.cli.dpo_checks import check_dpo

        return check_dpo(self.config)


PROGRAMS: dict[type, Any] = {PPOConfig: PPOProgram, SFTConfig: SFTProgram, RewardModelConfig: RewardProgram, DPOConfig: DPOProgram}


def program_of(config: Any) -> Program:
    """The stage that a config belongs to."""
    program: Program = PROGRAMS[type(config)](config)
    return program
