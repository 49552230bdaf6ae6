"""What policy and value workers share: the step's experience, and one optimizer step on part of it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.algos.whitening import whiten
from rlhf_dist.config.deepspeed import resolve_deepspeed
from rlhf_dist.config.engines import EngineSection, PolicySection, TrainedSection
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.engine import Engine, Objective, Outputs, StepInfo
from rlhf_dist.contracts.experience import ExperienceBatch, SequenceBatch
from rlhf_dist.contracts.moments import Moments
from rlhf_dist.contracts.roles import Fault, UpdateInfo, UpdateRequest
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.engines.deepspeed import DeepSpeedEngine, Training
from rlhf_dist.engines.process import Rank
from rlhf_dist.models.flops import flops_of, training_flops, whole_size
from rlhf_dist.models.loading import load_causal_lm
from rlhf_dist.models.lora import add_adapter
from rlhf_dist.models.policy import PolicyModule
from rlhf_dist.runs.capsule import Facts, Part
from rlhf_dist.workers.capsules import CapsuleWriter


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
        self._engine, self._objective, self._whitens, self._name = engine, objective, whitens, name
        self._costs = training_flops(engine.module)
        self._capsules, self._written = capsules, 0
        self._experience: ExperienceBatch | None = None

    def load(self, shards: Sequence[ExperienceBatch], advantages: Moments) -> int:
        """Joins the shards in order and whitens the advantages over the global batch."""
        batch = ExperienceBatch.concat(list(shards))
        if self._whitens:
            assert batch.advantages_BT is not None
            batch = batch.replace(advantages_BT=whiten(batch.advantages_BT, batch.response_mask_BT, advantages))
        self._experience, self._written = batch, 0
        return len(batch)

    def update(self, request: UpdateRequest) -> UpdateInfo:
        """One optimizer step on this rank's microbatches; an empty microbatch counts for nothing. Collective.

        `perf/*_update_tflops` merges over ranks and steps to the operations of a working rank in its seconds, waiting included.
        """
        assert self._experience is not None, "load the experience first"
        began = time.perf_counter()
        microbatches = [self._experience.select(rows) for rows in request.microbatches if rows]
        losses: list[float] = []
        tally = self._engine.forward_backward(microbatches, _recording(self._objective, losses), request.denominator)
        step = self._engine.optimizer_step()
        unsound = self._engine.unsound_weights()
        seconds = time.perf_counter() - began
        if microbatches:
            tally.add(f"perf/{self._name}_update_tflops", flops_of(self._costs, microbatches) / 1e12, seconds)
        fault = self._fault(step, losses)
        capsule = self._write_down(request, fault, step, losses) if fault and not self._engine.any_rank(bool(unsound)) else ""
        return UpdateInfo(tally, step, seconds, fault, capsule, unsound)

    def _fault(self, step: StepInfo, losses: Sequence[float]) -> Fault:
        """What was not finite, on any rank. Collective where the step was skipped, which all ranks know."""
        if not step.skipped:
            return ""
        if self._engine.any_rank(not all(math.isfinite(loss) for loss in losses)):
            return "loss"
        return "" if step.overflow else "gradient"

    def _write_down(self, request: UpdateRequest, fault: Fault, step: StepInfo, losses: Sequence[float]) -> str:
        if self._capsules is None or not request.capsule or self._written >= request.capsules:
            return ""
        self._written += 1
        assert self._experience is not None
        rows = [row for microbatch in request.microbatches for row in microbatch]
        places, start = [], 0
        for microbatch in request.microbatches:
            if microbatch:
                places.append(tuple(range(start, start + len(microbatch))))
            start += len(microbatch)
        facts = Facts(self._name, fault, request.denominator, step.grad_norm, step.lr)
        return self._capsules.write(Path(request.capsule), facts, Part(tuple(places), tuple(losses)), self._experience.select(rows))


def _recording(objective: Objective, losses: list[float]) -> Objective:
    """The same objective; each loss is also put into a list."""

    def recorded(outputs: Outputs, microbatch: SequenceBatch) -> tuple[Tensor, Tally]:
        loss, tally = objective(outputs, microbatch)
        losses.append(float(loss.detach()))
        return loss, tally

    return recorded


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
    model = prepare_checkpointing(load_policy(section, seed), section)
    return build_engine(PolicyModule(model, packing=section.packing), section, rank, Training(section.optim, steps))


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
