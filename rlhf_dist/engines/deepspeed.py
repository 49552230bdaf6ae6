"""The DeepSpeed engine: the verbs of `contracts.Engine` over one ZeRO-sharded module. Every quirk of its gradient scaling is here."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_dist.algos.schedules import lr_factor
from rlhf_dist.config.deepspeed import zero_stage
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.optim import OptimSection
from rlhf_dist.contracts.engine import Objective, Outputs, SavedFile, StepInfo
from rlhf_dist.contracts.roles import RestInfo
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.engines.fragments import (
    drop_gradients,
    fill,
    fragments,
    host_pieces,
    refuse_unsaveable,
    restore_scaler,
    scaler_of,
    step_or_say_why,
    unsound,
    weights_from_masters,
)
from rlhf_dist.engines.offload import Parking, own_weights, scratch_storages, training_storages, weight_storages
from rlhf_dist.engines.process import Rank, quiet_deepspeed
from rlhf_dist.engines.state_files import (
    BUFFERS,
    FORMAT,
    INDEX,
    Index,
    Piece,
    SavedState,
    StateWriter,
    rank_file,
    settled,
    write_buffers,
    write_index,
    write_pieces,
    writing,
)
from rlhf_dist.models.lora import named_weights, trained_weights
from rlhf_dist.models.saving import ORIGIN, write_origin

BUCKET_BYTES = 256 * 2**20


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
        UserError: fp16 on a CPU, which DeepSpeed refuses; a DeepSpeed config under which training could not be saved or checked.
    """

    def __init__(self, module: nn.Module, config: dict[str, Any], rank: Rank, training: Training | None = None) -> None:
        if config["fp16"]["enabled"] and rank.device == "cpu":
            raise UserError("DeepSpeed refuses fp16 on a CPU", where="dtype: fp16", fix="use bf16 or fp32 on CPUs")
        self.rank, self.world_size, self.device = rank.rank, rank.world_size, torch.device(rank.device)
        self.stage = zero_stage(config)
        self._training = training
        self._steps_taken = 0
        self._dtype = next((name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled")), "fp32")
        if training is not None:
            refuse_unsaveable(config)
        optimizer = _adamw(module, training.optim, self.device) if training else None
        if training is None and self.stage == 0:
            self._engine: Any = None
            self.module: Any = module.to(self.device)
        else:
            self._engine, *_ = quiet_deepspeed().initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
            self.module = self._engine.module
        self.module.eval()
        self._training_state, self._weights = Parking(self.device), Parking(self.device)
        self._writer = StateWriter()

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
        A loss that is not finite is replaced by one whose gradient is NaN throughout, which all ranks see in the norm that they share.
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
                if not math.isfinite(float(loss.detach())):  # its own gradient may be finite
                    loss = sum(tensor.sum() * math.nan for tensor in outputs.values() if tensor.requires_grad)
            else:
                loss = sum(tensor.sum() * 0.0 for tensor in outputs.values() if tensor.requires_grad)
            self._engine.backward(loss * (self.world_size / denominator))
        self.module.eval()
        return tally

    def optimizer_step(self) -> StepInfo:
        """Clips, steps, advances the schedule, clears the gradient. The norm is global, before clipping.

        A gradient that is not finite on any rank is dropped on all: weights and moments stay as they are. The ZeRO optimisers see that from
        the norm that they share; without ZeRO nobody looks, but every rank holds the whole gradient.

        Raises:
            UserError: fp16's loss scale cannot become smaller, and the gradient overflows still.
        """
        training = self._trained()
        optim = training.optim
        lr = optim.lr * lr_factor(self._steps_taken, training.total_steps, optim.warmup_steps, optim.schedule)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        skipped_before = self._engine.skipped_steps
        norm = _replicated_norm(self.module) if self.stage == 0 else None
        if norm is None or math.isfinite(norm):
            step_or_say_why(self._engine)
        else:
            drop_gradients(self.module, self._engine.optimizer, self.stage)
            self._engine.skipped_steps += 1
        self._steps_taken += 1
        norm = float(self._engine.get_global_grad_norm() or 0.0) if norm is None else norm
        skipped = self._engine.skipped_steps > skipped_before
        return StepInfo(norm, lr, skipped, overflow=skipped and self._dtype == "fp16")

    def unsound_weights(self) -> str:
        """The first trained weight of which this rank owns a number that is not finite (in fp32, where that is kept); empty: none."""
        return unsound(fragments(self.module, self._engine.optimizer, self.stage))

    def any_rank(self, mine: bool) -> bool:
        """Whether it is so on some rank. Collective."""
        return bool(self._agreed_rounds(int(mine)))

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

    def begin_save(self, folder: Path) -> None:
        """Copies what this rank has of fp32 weights and moments to host memory; a thread writes it while training goes on (`state_files`).

        Frozen weights are left out: they are those of the base model, whose folder is named instead. Waits while an earlier save is being
        written: at no time are there two copies. No collective.

        Raises:
            UserError: the earlier save failed and `saved` was not asked.
        """
        self._trained()
        self._writer.wait()
        self.wake(training=True)
        writes = self.stage > 0 or self.rank == 0
        owned = fragments(self.module, self._engine.optimizer, self.stage) if writes else []
        pieces = host_pieces(owned, self._engine.optimizer, self.stage)
        index = self._index() if self.rank == 0 else None
        buffers = {name: held.detach().cpu().clone() for name, held in self._buffers().items()} if self.rank == 0 else {}
        self._writer.begin(partial(self._write, folder, pieces, index, buffers))

    def saved(self, wait: bool) -> tuple[SavedFile, ...] | None:
        """The files that this rank's last save wrote, durable; None while it is still writing and the caller does not wait.

        Raises:
            UserError: it could not be written; what was written of it is gone.
        """
        return self._writer.saved(wait)

    def load(self, folder: Path) -> None:
        """Restores what a save wrote, of any number of ranks at any ZeRO stage in any precision. A pending gradient is dropped.

        Optimiser settings (learning rate, betas) stay those of this engine.

        Raises:
            UserError: the folder holds no whole checkpoint, or one of a model that trains other weights; on all ranks if on one.
        """
        self._trained()
        self.wake(training=True)
        saved = self._opened(folder)
        optimizer = self._engine.optimizer
        drop_gradients(self.module, optimizer, self.stage)
        fill(fragments(self.module, optimizer, self.stage), optimizer, self.stage, saved)
        weights_from_masters(optimizer, self.stage)
        for name, held in self._buffers().items():
            held.copy_(saved.buffers[name])
        restore_scaler(optimizer, saved.index.scaler)
        self._steps_taken = saved.index.steps_taken
        self._engine.global_steps, self._engine.skipped_steps = saved.index.global_steps, saved.index.skipped_steps
        self.module.eval()

    def close(self) -> None:
        """Frees the weights and the optimiser's buckets, once a running save is written; no other verb may follow. Safe to call twice.

        Under ZeRO 3 DeepSpeed remembers every module that it ever sharded, so it is not enough to let go of the engine.
        """
        self._writer.close()
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

    def _write(self, folder: Path, pieces: list[Piece], index: Index | None, buffers: dict[str, Tensor]) -> tuple[SavedFile, ...]:
        """In the writer's thread: this rank's file, and on rank 0 what the ranks have in common."""
        with writing(folder) as files:
            if pieces:
                files.append(write_pieces(folder / rank_file(self.rank), pieces))
            if index is not None:
                files.append(write_index(folder / INDEX, index))
                write_origin(self.module.model, folder)
                files += [settled(folder / name) for name in ("config.json", ORIGIN)]
            if buffers:
                files.append(write_buffers(folder / BUFFERS, buffers))
        return tuple(files)

    def _index(self) -> Index:
        engine = self._engine
        counts = {"steps_taken": self._steps_taken, "global_steps": engine.global_steps, "skipped_steps": engine.skipped_steps}
        return Index(
            format=FORMAT,
            world_size=self.world_size,
            files=self.world_size if self.stage else 1,
            stage=self.stage,
            dtype=self._dtype,
            parameters=self._shapes(),
            scaler=scaler_of(engine.optimizer),
            **counts,
        )

    def _opened(self, folder: Path) -> SavedState:
        """The checkpoint, once every rank has found it whole and its own: what follows is a collective."""
        refused = None
        try:
            saved = SavedState(folder)
            _same_model(saved, self._shapes(), self._buffers(), folder)
        except UserError as error:
            refused = error
        if self._agreed_rounds(int(refused is not None)):
            fix = "see the other ranks' reports; all ranks must reach the folder"
            raise refused or UserError("another rank cannot use the checkpoint", where=f"{folder}, rank {self.rank}", fix=fix)
        return saved

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what is trained, whole, by name."""
        named = {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        return {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in named.items()}

    def _buffers(self) -> dict[str, Tensor]:
        """Those that a checkpoint keeps; where weights are frozen they too come with the base model."""
        if not all(parameter.requires_grad for parameter in self.module.parameters()):
            return {}
        held = self.module.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in held.items() if not isinstance(tensor, nn.Parameter)}

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
    for parameter in parameters:
        parameter.data = parameter.data.contiguous()  # a checkpoint holds them flattened
    return torch.optim.AdamW(parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True)


def _same_model(saved: SavedState, shapes: dict[str, tuple[int, ...]], buffers: dict[str, Tensor], folder: Path) -> None:
    """Holds a checkpoint against the model that is to take it.

    Raises:
        UserError: it trains other weights, or weights of other shapes; the first of them is named.
    """
    found = {**saved.index.parameters, **{name: tuple(held.shape) for name, held in saved.buffers.items()}}
    wanted = {**shapes, **{name: tuple(held.shape) for name, held in buffers.items()}}
    odd = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if odd:
        sides = ((found, "in the checkpoint"), (wanted, "here"))
        what = " and ".join(f"{list(side[odd[0]])} {place}" if odd[0] in side else f"absent {place}" for side, place in sides)
        fix = "resume with the model and the adapter settings that the run began with"
        raise UserError(f"the checkpoint is of a model that trains other weights: {odd[0]} is {what}", where=str(folder), fix=fix)


def _replicated_norm(module: nn.Module) -> float:
    """Norm of gradients that every rank holds whole: DeepSpeed reports none for fp32 without ZeRO."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return {key: _to(inner, device) for key, inner in value.items()} if isinstance(value, dict) else value
