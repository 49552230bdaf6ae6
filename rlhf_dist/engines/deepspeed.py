"""The DeepSpeed engine: five verbs over one ZeRO-sharded module. Every quirk of DeepSpeed's gradient scaling lives in this file."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_dist.algos.schedules import lr_factor
from rlhf_dist.config.deepspeed import zero_stage
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.optim import OptimSection
from rlhf_dist.contracts.engine import Objective, Outputs, StepInfo
from rlhf_dist.contracts.roles import RestInfo
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.engines.offload import Parking, own_weights, scratch_storages, training_storages, weight_storages
from rlhf_dist.engines.process import Rank, quiet_deepspeed
from rlhf_dist.models.lora import named_weights, trained_weights
from rlhf_dist.models.saving import write_origin

BUCKET_BYTES = 256 * 2**20
TAG = "engine"  # DeepSpeed's name for the one checkpoint in a folder


@dataclass(frozen=True)
class Training:
    """What makes an engine a trained one: optimiser settings and the number of optimizer steps the schedule spans."""

    optim: OptimSection
    total_steps: int


class DeepSpeedEngine:
    """One model, sharded over the ranks of the process group (contracts.Engine).

    Args:
        module: a role's module: `inputs(batch)` gives the keyword arguments of its forward, `blank()` a batch that counts for nothing.
        config: resolved DeepSpeed config (`config.deepspeed.resolve_deepspeed`).
        rank: this process.
        training: None for an engine that only runs forward.

    Raises:
        UserError: fp16 on a CPU, which DeepSpeed refuses.
    """

    def __init__(self, module: nn.Module, config: dict[str, Any], rank: Rank, training: Training | None = None) -> None:
        if config["fp16"]["enabled"] and rank.device == "cpu":
            raise UserError("DeepSpeed refuses fp16 on a CPU", where="dtype: fp16", fix="use bf16 or fp32 on CPUs")
        self.rank, self.world_size, self.device = rank.rank, rank.world_size, torch.device(rank.device)
        self.stage = zero_stage(config)
        self._training = training
        self._steps_taken = 0
        optimizer = _adamw(module, training.optim, self.device) if training else None
        if training is None and self.stage == 0:
            self._engine: Any = None
            self.module: Any = module.to(self.device)
        else:
            self._engine, *_ = quiet_deepspeed().initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
            self.module = self._engine.module
        self.module.eval()
        self._training_state, self._weights = Parking(self.device), Parking(self.device)

    def rest(self, *, weights: bool = False) -> int:
        """Takes what only training needs out of the device, and the weights as well if asked; returns the bytes that left so far.

        Each verb brings back what it needs. Between optimizer steps only, and never between `forward_backward` and its step.
        """
        if self._training is not None and not self._training_state.bytes:
            optimizer = self._engine.optimizer
            self._training_state.park(training_storages(optimizer, self.module).values(), scratch_storages(optimizer).values())
        if weights and not self._weights.bytes:
            own_weights(self.module)
            self._weights.park(weight_storages(self.module).values())
        return self._training_state.bytes + self._weights.bytes

    @property
    def resting(self) -> RestInfo:
        """What is off the device, and how long that has taken."""
        training, weights = self._training_state, self._weights
        return RestInfo(training.bytes, weights.bytes, training.seconds + weights.seconds)

    def wake(self, *, training: bool = False) -> None:
        """Brings the weights back, and what training needs if asked. For whoever uses the module without a verb."""
        self._weights.restore()
        if training:
            self._training_state.restore()

    def forward(self, microbatches: Sequence[Any], **options: Any) -> list[Outputs]:
        """Outputs of each microbatch, without gradient, on the CPU. Ranks may pass different numbers of microbatches, also none.

        Under ZeRO 3 every forward is a collective, so ranks with fewer forward blanks along with the others.
        """
        self.wake()
        rounds = self._agreed_rounds(len(microbatches))
        call = self.module if self._engine is None else self._engine
        outputs = []
        with torch.no_grad():
            for number in range(rounds):
                batch = microbatches[number] if number < len(microbatches) else self.module.blank()
                result = call(**_to(self.module.inputs(batch), self.device), **options)
                if number < len(microbatches):
                    outputs.append({name: tensor.cpu() for name, tensor in result.items()})
        return outputs

    def forward_backward(self, microbatches: Sequence[Any], objective: Objective, denominator: float) -> Tally:
        """Accumulates the gradient of Σ loss / denominator over all ranks and microbatches.

        DeepSpeed divides what it reduces by the number of ranks and, at the boundary, not by our number of microbatches
        (gradient_accumulation_steps is 1): so the loss is multiplied by the ranks, and the boundary is set by hand.
        """
        self._trained()
        self.wake(training=True)
        rounds = max(self._agreed_rounds(len(microbatches)), 1)
        tally = Tally()
        # Transformers recomputes activations in training mode only; dropout is 0, so nothing else changes with the mode.
        self.module.train(bool(getattr(self.module.model, "is_gradient_checkpointing", False)))
        for number in range(rounds):
            batch = microbatches[number] if number < len(microbatches) else self.module.blank()
            self._engine.set_gradient_accumulation_boundary(number == rounds - 1)
            outputs = self._engine(**_to(self.module.inputs(batch), self.device))
            if number < len(microbatches):
                loss, counted = objective(outputs, batch.to(self.device))
                tally.merge(counted)
            else:
                loss = sum(tensor.sum() * 0.0 for tensor in outputs.values() if tensor.requires_grad)
            self._engine.backward(loss * (self.world_size / denominator))
        self.module.eval()
        return tally

    def optimizer_step(self) -> StepInfo:
        """Clips, steps, advances the schedule, clears the gradient. The norm is global, before clipping."""
        training = self._trained()
        optim = training.optim
        lr = optim.lr * lr_factor(self._steps_taken, training.total_steps, optim.warmup_steps, optim.schedule)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        skipped_before = self._engine.skipped_steps
        norm = _replicated_norm(self.module) if self.stage == 0 else None
        self._engine.step()
        self._steps_taken += 1
        norm = float(self._engine.get_global_grad_norm() or 0.0) if norm is None else norm
        return StepInfo(norm, lr, self._engine.skipped_steps > skipped_before)

    def export_weights(self, merged: bool = True, bucket_bytes: int = BUCKET_BYTES) -> Iterator[dict[str, Tensor]]:
        """Weights in buckets of bounded size, copies all of them.

        Args:
            merged: all weights under Hugging Face names, adapters merged; otherwise the trained ones alone, as they are.
            bucket_bytes: most bytes in a bucket; a larger weight travels alone.
        """
        self.wake()
        bucket: dict[str, Tensor] = {}
        size = 0
        for name, parameters, compute in (named_weights if merged else trained_weights)(self.module.model):
            with self._gathered(parameters):
                weight = compute().clone()
            if bucket and size + weight.nbytes > bucket_bytes:
                yield bucket
                bucket, size = {}, 0
            bucket[name] = weight
            size += weight.nbytes
        if bucket:
            yield bucket

    def save(self, folder: Path) -> None:
        """Writes weights and optimiser state, one file a rank, and what `engines.consolidation` needs to know of the model.

        Frozen weights are left out: they are those of the base model, whose folder is named instead.
        """
        self._trained()
        self.wake(training=True)
        self._engine.save_checkpoint(
            str(folder),
            tag=TAG,
            client_state={"steps_taken": self._steps_taken},
            save_latest=False,
            exclude_frozen_parameters=self._freezes(),
        )
        if self.rank == 0:
            write_origin(self.module.model, folder)

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote.

        Raises:
            UserError: the folder holds no checkpoint of this engine.
        """
        self._trained()
        self.wake(training=True)
        kept = _load_trained if self._freezes() else None
        path, state = None, {}
        if (folder / TAG).is_dir():
            path, state = self._engine.load_checkpoint(str(folder), tag=TAG, custom_load_fn=kept)
        if path is None:
            fix = "name a folder that `save` wrote with the same ranks and ZeRO stage"
            raise UserError("the folder holds no engine checkpoint", where=str(folder), fix=fix)
        self._steps_taken = state["steps_taken"]
        self.module.eval()

    def close(self) -> None:
        """Frees the weights and the optimiser's buckets; no other verb may follow. Safe to call twice.

        Under ZeRO 3 DeepSpeed remembers every module that it ever sharded, so it is not enough to let go of the engine.
        """
        for parameter in self.module.parameters() if self.module is not None else ():
            for held in (parameter, getattr(parameter, "ds_tensor", None)):
                if held is not None:
                    held.data = held.data.new_empty(0)
        if self._engine is not None:
            self._engine.destroy()
        self._engine = self.module = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _freezes(self) -> bool:
        return not all(parameter.requires_grad for parameter in self.module.parameters())

    def _trained(self) -> Training:
        assert self._training is not None, "an engine without training settings runs forward only"
        return self._training

    def _agreed_rounds(self, mine: int) -> int:
        if self.world_size == 1:
            return mine
        rounds = torch.tensor([mine], dtype=torch.long, device=self.device)
        dist.all_reduce(rounds, op=dist.ReduceOp.MAX)
        return int(rounds.item())

    def _gathered(self, parameters: list[nn.Parameter]) -> Any:
        return quiet_deepspeed().zero.GatheredParameters(parameters, enabled=self.stage == 3)


def _adamw(module: nn.Module, optim: OptimSection, device: torch.device) -> torch.optim.Optimizer:
    parameters = [p for p in module.parameters() if p.requires_grad]
    module.to(device)
    return torch.optim.AdamW(parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True)


def _load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Loads the weights that are trained: the checkpoint holds no others.

    Raises:
        UserError: it holds others than this model trains.
    """
    trained = {name for name, parameter in dst.named_parameters() if parameter.requires_grad}
    buffers = {name for name, held in dst.state_dict(keep_vars=True).items() if not isinstance(held, nn.Parameter)}
    missing, unexpected = dst.load_state_dict(src, strict=False)
    odd = sorted({*unexpected, *((trained | buffers) & set(missing))})
    if odd:
        fix = "resume with the adapter settings that the run began with"
        raise UserError(f"the checkpoint is of a model that trains other weights: {odd[0]}", where="engine checkpoint", fix=fix)


def _replicated_norm(module: nn.Module) -> float:
    """Norm of gradients that every rank holds whole: DeepSpeed reports none for fp32 without ZeRO."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return {key: _to(inner, device) for key, inner in value.items()} if isinstance(value, dict) else value
