"""A skipped optimizer step once more, from its capsule, in one process: the loss of every sample, and where a number is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_dist.algos.objectives import ValueObjective
from rlhf_dist.config.engines import Dtype
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.loading import load_config
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.engine import Objective, Outputs
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.runs.capsule import CONFIG, MODEL, TRAINED, Capsule, total
from rlhf_dist.workers.policy import policy_module, policy_objective
from rlhf_dist.workers.value import value_module
from rlhf_dist.workers.weight_sync import trained_weights_of

TOLERANCE: dict[Dtype, float] = {"fp32": 1e-6, "bf16": 2e-2, "fp16": 5e-3}
"""Of a microbatch's loss, in sums of the sizes of its samples' losses: kernels of another machine round otherwise."""
READ = {
    "policy": (("old_logprobs_BT", "rollout_logprobs_BT", "advantages_BT"), ("logprobs_BT", "entropy_BT")),
    "value": (("values_BT", "returns_BT"), ("values_BT",)),
}
"""What the losses are made of: of the experience, and of the model's answer. In this order a fault is looked for."""


@dataclass(frozen=True)
class Sample:
    """A row of the step. loss: its term of the microbatch's sum. fault: the first number that is not finite, in words; empty: all are."""

    rank: int
    microbatch: int
    prompt_id: int
    sample_index: int
    tokens: int
    loss: float
    fault: str
    prompt: str
    completion: str


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
        UserError: the capsule's files do not fit together; its base model (of adapters) is not there.
    """
    config = load_config(PPOConfig, capsule.folder / CONFIG)
    role, section = capsule.facts.role, config.policy if capsule.facts.role == "policy" else config.value
    module, objective = (
        _module(capsule, config).to(device),
        policy_objective(config) if role == "policy" else ValueObjective(config.algorithm),
    )
    found = Replay(capsule.facts.denominator, section.dtype)
    for rank, part in enumerate(capsule.parts):
        rows = capsule.rows(rank) if part.microbatches else None
        for number, (places, recorded) in enumerate(zip(part.microbatches, part.losses, strict=True), start=1):
            assert rows is not None
            batch = rows.select(places)
            with torch.set_grad_enabled(gradient):
                outputs = module(**_to(module.inputs(batch), device))
                loss, _ = objective(outputs, batch.to(device))
                if gradient:
                    (loss / found.denominator).backward()
            answers = {name: tensor.detach().cpu() for name, tensor in outputs.items()}
            samples = [_sample(rank, number, role, single, answer, objective) for single, answer in _rows(batch, answers)]
            found.samples += samples
            size = sum(abs(sample.loss) for sample in samples)
            found.microbatches.append(MicrobatchLoss(rank, number, recorded, float(loss.detach()), size))
    if gradient:
        _look_at_gradient(module, found)
    return found


def _module(capsule: Capsule, config: PPOConfig) -> Any:
    """The role's module with the weights of the capsule."""
    role, build = capsule.facts.role, policy_module if capsule.facts.role == "policy" else value_module
    section: Any = getattr(config, role)
    if section.lora is not None:
        module = build(config)
        _take(trained_weights_of(module.model), capsule)
        return module
    changes = {"model": str(capsule.folder / MODEL)} | ({"head_init": "keep"} if role == "value" else {})
    return build(config.model_copy(update={role: section.model_copy(update=changes)}))


@torch.no_grad()
def _take(held: Mapping[str, Tensor], capsule: Capsule) -> None:
    try:
        saved = load_file(capsule.folder / TRAINED)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{TRAINED} cannot be read: {type(error).__name__}", where=str(capsule.folder), fix="use another capsule") from None
    if {name: weight.shape for name, weight in held.items()} != {name: weight.shape for name, weight in saved.items()}:
        fix = "put the base model back as it was when the run began"
        raise UserError("the trained weights do not fit the base model", where=str(capsule.folder), fix=fix)
    for name, weight in held.items():
        weight.copy_(saved[name])


def _rows(batch: ExperienceBatch, outputs: Outputs) -> Iterator[tuple[ExperienceBatch, Outputs]]:
    """One row at a time, with the model's answers to it."""
    for row in range(len(batch)):
        single = batch.select([row])
        width = single.response_tokens_BT.shape[1]
        yield single, {name: each[row : row + 1, :width] if name.endswith("_BT") else each[row : row + 1] for name, each in outputs.items()}


def _sample(rank: int, microbatch: int, role: str, row: ExperienceBatch, outputs: Outputs, objective: Objective) -> Sample:
    loss = float(objective(outputs, row)[0])
    given, answered = READ[role]
    named = [(name, getattr(row, name)) for name in given] + [(f"the model's {name}", outputs[name]) for name in answered]
    fault = next((place for name, each in named if (place := _place(name, each, row))), "" if math.isfinite(loss) else "the loss itself")
    ids = int(row.prompt_id_B[0]), int(row.sample_index_B[0]), int(row.valid_tokens_B[0])
    return Sample(rank, microbatch, *ids, loss, fault, row.prompts[0], row.completions[0])


def _place(name: str, values_BT: Tensor | None, row: ExperienceBatch) -> str:
    """The first trained token at which a number is not finite, in words."""
    if values_BT is None:
        return ""
    wrong = (~values_BT.isfinite() & row.response_mask_BT)[0].nonzero().flatten().tolist()
    if not wrong:
        return ""
    token, value = int(row.response_tokens_BT[0, wrong[0]]), float(values_BT[0, wrong[0]])
    more = f", and at {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"{name} is {value} at response token {wrong[0] + 1} (id {token}){more}"


def _look_at_gradient(module: nn.Module, found: Replay) -> None:
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    found.grad_norm = float(torch.nn.utils.get_total_norm(list(gradients.values()))) if gradients else 0.0
    found.gradient_fault = next((name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())), "")


def _to(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return {key: _to(inner, device) for key, inner in value.items()} if isinstance(value, dict) else value
