"""A skipped optimizer step once more, from its capsule, in one process: the loss of every row, and where a number is not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.config.engines import Dtype
from rlhf_dist.config.errors import UserError, first_line
from rlhf_dist.contracts.engine import Objective
from rlhf_dist.runs.capsule import Capsule, total
from rlhf_dist.workers.replay_experience import READ, ExperienceSubject
from rlhf_dist.workers.replay_rows import KINDS, RowsSubject
from rlhf_dist.workers.replay_subject import Look, Subject

TOLERANCE: dict[Dtype, float] = {"fp32": 1e-6, "bf16": 2e-2, "fp16": 5e-3}
"""Of a microbatch's loss, in sums of the sizes of its samples' losses: kernels of another machine round otherwise."""


@dataclass(frozen=True)
class Sample:
    """A row of the step. name: which it is. tokens: that are trained on. loss: its term of the microbatch's sum. fault: the first number
    that is not finite, in words; empty: all are. texts: by what they are."""

    rank: int
    microbatch: int
    name: str
    tokens: int
    loss: float
    fault: str
    texts: dict[str, str]


@dataclass(frozen=True)
class MicrobatchLoss:
    """A microbatch's loss, summed: as it was recorded, and now. size: Σ |loss| of its samples, what rounding is measured by."""

    rank: int
    number: int
    recorded: float
    now: float
    size: float

    def same(self, tolerance: float) -> bool:
        """Whether both are equal up to rounding, or neither is finite."""
        if not (math.isfinite(self.recorded) and math.isfinite(self.now)):
            return math.isfinite(self.recorded) == math.isfinite(self.now)
        return abs(self.recorded - self.now) <= tolerance * self.size


@dataclass
class Replay:
    """What came out. denominator: of the step. dtype: the model's. grad_norm: over the whole step, before clipping; None: not computed.
    gradient_fault: the first parameter whose gradient is not finite."""

    denominator: float
    dtype: Dtype
    samples: list[Sample] = field(default_factory=list)
    microbatches: list[MicrobatchLoss] = field(default_factory=list)
    grad_norm: float | None = None
    gradient_fault: str = ""

    @property
    def loss(self) -> float:
        """Of the step."""
        return total([each.now for each in self.microbatches]) / self.denominator

    @property
    def reproduced(self) -> bool:
        """Whether every microbatch gave the loss that was recorded."""
        return all(each.same(TOLERANCE[self.dtype]) for each in self.microbatches)


def replay(capsule: Capsule, device: str = "cpu", *, gradient: bool = True) -> Replay:
    """Does the forwards of all ranks one after the other, and their backwards unless told not to. No weight changes.

    Raises:
        UserError: the capsule's files do not fit together; its base model (of adapters) is not there; there is no such device.
    """
    subject = subject_of(capsule)
    module, objective = _placed(subject.module, device), subject.objective
    found = Replay(capsule.facts.denominator, subject.dtype)
    for rank, part in enumerate(capsule.parts):
        rows = subject.rows(rank) if part.microbatches else ()
        if len(rows) != sum(map(len, part.microbatches)):
            what = f"rank {rank} has {len(rows)} rows for microbatches of {sum(map(len, part.microbatches))}"
            raise UserError(what, where=str(capsule.folder), fix="use another capsule")
        for number, (places, recorded) in enumerate(zip(part.microbatches, part.losses, strict=True), start=1):
            batch = subject.batch(rows, places)
            with torch.set_grad_enabled(gradient):
                outputs = module(**_to(module.inputs(batch), device))
                loss, _ = objective(outputs, batch.to(device))
                if gradient:
                    (loss / found.denominator).backward()
            answers = {name: tensor.detach().cpu() for name, tensor in outputs.items()}
            samples = [_sample(rank, number, look, objective) for look in subject.looks(rows, places, answers)]
            found.samples += samples
            size = sum(abs(sample.loss) for sample in samples)
            found.microbatches.append(MicrobatchLoss(rank, number, recorded, float(loss.detach()), size))
    if gradient:
        _look_at_gradient(module, found)
    return found


def subject_of(capsule: Capsule) -> Subject:
    """The model of a capsule, as it was.

    Raises:
        UserError: of no known stage or role; or its weights cannot be read.
    """
    facts = capsule.facts
    if facts.stage in KINDS:
        return RowsSubject(capsule)
    if facts.stage == "ppo" and facts.role in READ:
        return ExperienceSubject(capsule)
    what = f"a capsule of the {facts.role!r} of the stage {facts.stage!r}, which this version does not know"
    raise UserError(what, where=str(capsule.folder), fix="use the version that wrote it")


def _placed(module: Any, device: str) -> Any:
    try:
        return module.to(device)
    except (RuntimeError, AssertionError) as error:  # of a torch without CUDA, an assertion
        fix = "name a device of this machine: cpu, or cuda where torch sees a GPU"
        raise UserError(f"the model cannot go to {device}: {first_line(error)}", where="--device", fix=fix) from None


def _sample(rank: int, microbatch: int, look: Look, objective: Objective) -> Sample:
    with torch.no_grad():
        loss = float(objective(look.outputs, look.batch)[0])
    fault = look.fault or ("" if math.isfinite(loss) else "the loss itself")
    return Sample(rank, microbatch, look.name, look.tokens, loss, fault, look.texts)


def _look_at_gradient(module: nn.Module, found: Replay) -> None:
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    found.grad_norm = float(torch.nn.utils.get_total_norm(list(gradients.values()))) if gradients else 0.0
    found.gradient_fault = next((name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())), "")


def _to(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return {key: _to(inner, device) for key, inner in value.items()} if isinstance(value, dict) else value
