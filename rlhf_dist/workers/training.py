"""What policy and value workers share: the step's experience, and one optimizer step on part of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from rlhf_dist.algos.whitening import whiten
from rlhf_dist.config.deepspeed import resolve_deepspeed
from rlhf_dist.config.engines import EngineSection, PolicySection, TrainedSection
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.engine import Engine, Objective
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.contracts.moments import Moments
from rlhf_dist.contracts.roles import UpdateInfo, UpdateRequest
from rlhf_dist.engines.deepspeed import DeepSpeedEngine, Training
from rlhf_dist.engines.process import Rank
from rlhf_dist.models.flops import flops_of, training_flops, whole_size
from rlhf_dist.models.loading import load_causal_lm
from rlhf_dist.models.lora import add_adapter
from rlhf_dist.models.policy import PolicyModule
from rlhf_dist.workers.capsules import CapsuleWriter
from rlhf_dist.workers.steps import Steps


class Trainer:
    """Holds the experience between `load` and the last update of a step.

    Args:
        engine: trained engine.
        objective: its loss.
        whitens: whether advantages are whitened with the merged moments.
        name: of the role, in metrics.
        capsules: writes skipped steps down; None where none are.
    """

    def __init__(
        self, engine: Engine, objective: Objective, *, whitens: bool, name: str = "policy", capsules: CapsuleWriter | None = None
    ) -> None:
        self._whitens, self._name = whitens, name
        self._costs = training_flops(engine.module)
        self._steps = Steps(engine, objective, name, capsules)
        self._experience: ExperienceBatch | None = None

    def load(self, shards: Sequence[ExperienceBatch], advantages: Moments) -> int:
        """Joins the shards in order and whitens the advantages over the global batch."""
        batch = ExperienceBatch.concat(list(shards))
        if self._whitens:
            assert batch.advantages_BT is not None
            batch = batch.replace(advantages_BT=whiten(batch.advantages_BT, batch.response_mask_BT, advantages))
        self._experience = batch
        self._steps.begin()
        return len(batch)

    def update(self, request: UpdateRequest) -> UpdateInfo:
        """One optimizer step on this rank's microbatches; an empty microbatch counts for nothing. Collective.

        `perf/*_update_tflops` merges over ranks and steps to the operations of a working rank in its seconds, waiting included.
        """
        assert self._experience is not None, "load the experience first"
        began, experience = time.perf_counter(), self._experience
        cuts = [rows for rows in request.microbatches if rows]
        microbatches = [experience.select(rows) for rows in cuts]
        taken = self._steps.take(microbatches, request.denominator)
        seconds = time.perf_counter() - began
        if microbatches:
            taken.tally.add(f"perf/{self._name}_update_tflops", flops_of(self._costs, microbatches) / 1e12, seconds)
        fault, capsule = self._steps.look(request, taken, cuts, experience.select)
        return UpdateInfo(taken.tally, taken.info, seconds, fault, capsule, taken.unsound)


def build_engine(module: Any, section: EngineSection, rank: Rank, training: Training | None = None) -> DeepSpeedEngine:
    """An engine from its config section."""
    clip = training.optim.clip_norm if training else 0.0
    config = resolve_deepspeed(section.deepspeed, dtype=section.dtype, clip_norm=clip, trains=training is not None)
    return DeepSpeedEngine(module, config, rank, training)


def load_policy(section: PolicySection, seed: int) -> torch.nn.Module:
    """The causal LM of a section, with a new adapter where it trains one."""
    model = load_causal_lm(section, section.model)
    return model if section.lora is None else add_adapter(model, section.lora, seed)


def build_policy(section: PolicySection, seed: int, rank: Rank, steps: int) -> DeepSpeedEngine:
    """A trained engine of it, for a supervised stage of so many optimizer steps."""
    return build_engine(supervised_policy(section, seed), section, rank, Training(section.optim, steps))


def supervised_policy(section: PolicySection, seed: int) -> PolicyModule:
    """What a supervised stage trains of it, before its first step.

    Raises:
        UserError: the model cannot be loaded.
    """
    return PolicyModule(prepare_checkpointing(load_policy(section, seed), section), packing=section.packing)


def optimizer_steps(config: PPOConfig, idle: int = 0) -> int:
    """Optimizer steps of the whole run: what the learning-rate schedule spans. idle: PPO steps at the start in which the model rests."""
    return max(config.run.steps - idle, 1) * config.algorithm.epochs * config.algorithm.minibatches


def prepare_checkpointing(model: Any, section: TrainedSection) -> Any:
    """Switches activation recomputation on where the section asks for it (dropout is 0, so training mode samples nothing)."""
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def parameter_counts(module: torch.nn.Module) -> dict[str, int]:
    """All parameters and those that are trained; whole ones, also where ZeRO 3 left a shard of each here or they are held in 4 bits."""
    sizes = [(whole_size(p), p.requires_grad) for p in module.parameters()]
    return {"parameters": sum(size for size, _ in sizes), "trained_parameters": sum(size for size, trained in sizes if trained)}


def seeded(seed: int) -> None:
    """Seeds torch for whatever is initialised at random (nothing in a PPO step draws from it)."""
    torch.manual_seed(seed)
