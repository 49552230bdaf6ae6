"""Where DeepSpeed keeps fp32 weights and the moments of AdamW, on this rank and at each ZeRO stage: to read them out and to put them back.

    stage 0     the parameters themselves, whole on every rank
    stage 1, 2  one flat partition a parameter group; a parameter may begin on one rank and end on the next (`_hp_mapping`)
    stage 3     a partition of each parameter, end to end in flat sub-groups (`grad_position`); the last rank's ends in padding

No function here is a collective but `weights_from_masters`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.config.errors import UserError
from rlhf_dist.engines.state_files import KINDS, Piece, SavedState, Scaler

MOMENTS = KINDS[1:]


@dataclass(frozen=True)
class Fragment:
    """A run of a flattened trained parameter that this rank owns.

    start: its first element in the parameter. weight: [n], the numbers that training updates. held: the tensor that AdamW updates, of which
    the run begins at `offset`.
    """

    name: str
    start: int
    weight: Tensor
    held: Tensor
    offset: int

    @property
    def stop(self) -> int:
        return self.start + self.weight.numel()

    def of(self, moment: Tensor) -> Tensor:
        """The run [n] in a moment of `held`."""
        return moment.detach().view(-1).narrow(0, self.offset, self.weight.numel())


def refuse_unsaveable(config: dict[str, Any]) -> None:
    """Refuses what could not be saved, or would let a gradient that is not finite through, when the engine is built.

    Args:
        config: resolved DeepSpeed config of a trained engine.

    Raises:
        UserError: optimiser state on NVMe or on two devices at once; a check that is switched off.
    """
    zero = config["zero_optimization"]
    optimizer, weights = (zero.get(f"offload_{part}") or {} for part in ("optimizer", "param"))
    refused = {
        "offload to nvme": "nvme" in (optimizer.get("device"), weights.get("device")),
        "offload_optimizer.ratio below 1": optimizer.get("ratio", 1) != 1,
        "compute_grad_norm = false": not zero.get("compute_grad_norm", True),
        "bf16.check_grad_overflow = false": not config.get("bf16", {}).get("check_grad_overflow", True),
    }
    for what, asked in refused.items():
        if asked:
            why = "a non-finite gradient would be stepped on" if "grad" in what else "its optimiser state could not be saved"
            raise UserError(
                f"the DeepSpeed file asks for {what}: {why}", where="zero_optimization", fix="remove it from the DeepSpeed file"
            )


def fragments(module: nn.Module, optimizer: Any, stage: int) -> list[Fragment]:
    """What this rank owns, in the order of the parameters.

    Args:
        module: the trained module, which names the parameters. optimizer: DeepSpeed's, or torch's at stage 0.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters() if parameter.requires_grad}
    find = (_whole, _flat, _flat, _sharded)[stage]
    return list(find(names, module, optimizer))


def host_pieces(owned: Sequence[Fragment], optimizer: Any, stage: int) -> list[Piece]:
    """Fresh copies in host memory. Before the first step a moment is zero."""
    state = _adamw(optimizer, stage).state
    pieces = []
    for fragment in owned:
        seen = state.get(fragment.held) or {}
        tensors = {"weight": _host_copy(fragment.weight)}
        for kind in MOMENTS:
            tensors[kind] = _host_copy(fragment.of(seen[kind])) if seen else torch.zeros(fragment.weight.numel())
        pieces.append(Piece(fragment.name, fragment.start, float(seen["step"]) if seen else 0.0, tensors))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return pieces


@torch.no_grad()
def fill(owned: Sequence[Fragment], optimizer: Any, stage: int, saved: SavedState) -> None:
    """Fills fp32 weights, moments and step counts with what a checkpoint holds of them."""
    state = _adamw(optimizer, stage).state
    steps: dict[int, float] = {}
    for fragment in owned:
        seen = _moments(state, fragment.held)
        saved.read("weight", fragment.name, fragment.start, fragment.weight)
        for kind in MOMENTS:
            saved.read(kind, fragment.name, fragment.start, fragment.of(seen[kind]))
        step = max(steps.get(id(fragment.held), 0.0), saved.step(fragment.name, fragment.start, fragment.stop))
        steps[id(fragment.held)] = step
        seen["step"].fill_(step)


@torch.no_grad()
def weights_from_masters(optimizer: Any, stage: int) -> None:
    """Rounds the fp32 weights into those of the model, and spreads them over the ranks: what DeepSpeed does at the end of a step."""
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer._partition_all_parameters()
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer._post_step(set())


def drop_gradients(module: nn.Module, optimizer: Any, stage: int) -> None:
    """Forgets a gradient that no step has used, as a skipped step does."""
    for parameter in module.parameters():
        parameter.grad = None
    if stage == 0:
        return
    optimizer.zero_grad(set_to_none=True)
    if stage == 3:
        optimizer._pre_step()
        optimizer.averaged_gradients = {}
        return
    optimizer.micro_step_id = -1
    optimizer._epilogue_ran_this_backward = False
    optimizer._release_preflattened_grad_buffers()
    if optimizer.cpu_offload:
        optimizer._offload_accumulated_param_ids = set()
        optimizer.reset_cpu_buffers()
    for held in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
        for group in held:
            held[group] = None


def unsound(owned: Sequence[Fragment]) -> str:
    """The name of the first parameter with a number among them that is not finite; empty where there is none.

    A sum is not finite where one of its terms is not, and costs little beside a look at each; one that overflows is looked into.
    """
    sums = [fragment.weight.sum() for fragment in owned]
    if not sums or bool(torch.stack(sums).isfinite().all()):
        return ""
    return next((fragment.name for fragment in owned if not bool(fragment.weight.isfinite().all())), "")


def step_or_say_why(engine: Any) -> None:
    """DeepSpeed's step. Its loss scaler has a bare Exception for the end of its means.

    Raises:
        UserError: fp16's loss scale cannot become smaller, and the gradient overflows still.
    """
    try:
        engine.step()
    except Exception as error:
        if "loss scale" not in str(error):
            raise
        what = "the gradient overflows in fp16 even at the smallest loss scale"
        fix = "use dtype: bf16 or fp32, lower the learning rate, or go back to a checkpoint from before training diverged"
        raise UserError(what, where="optimizer step", fix=fix) from error


def scaler_of(optimizer: Any) -> Scaler | None:
    """The state of a dynamic loss scale, None where there is none."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False):
        return None
    return Scaler(**{name: getattr(scaler, name) for name in Scaler.model_fields})


def restore_scaler(optimizer: Any, saved: Scaler | None) -> None:
    """Sets a dynamic loss scale back. One that was saved by an engine in another precision begins anew."""
    if saved is not None and scaler_of(optimizer) is not None:
        for name, value in saved:
            setattr(optimizer.loss_scaler, name, value)


def _whole(names: dict[int, str], module: nn.Module, optimizer: Any) -> Iterator[Fragment]:
    for parameter in module.parameters():
        if id(parameter) in names and parameter.numel():
            yield Fragment(names[id(parameter)], 0, parameter.detach().view(-1), parameter, 0)


def _flat(names: dict[int, str], module: nn.Module, optimizer: Any) -> Iterator[Fragment]:
    for flat, group in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        for parameter in group:
            place = parameter._hp_mapping
            if place is not None:
                run = place.hp_fragment_address
                weight = flat.detach().narrow(0, run.start, run.numel)
                yield Fragment(names[id(parameter)], place.lp_fragment_address.start, weight, flat, run.start)


def _sharded(names: dict[int, str], module: nn.Module, optimizer: Any) -> Iterator[Fragment]:
    for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        for parameter in group:
            _, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = size * optimizer._get_param_partition_rank(parameter)
            numel = min(size, parameter.ds_numel - start)
            if numel > 0:
                yield Fragment(names[id(parameter)], start, flat.detach().narrow(0, offset, numel), flat, offset)


def _adamw(optimizer: Any, stage: int) -> Any:
    return optimizer.optimizer if stage else optimizer


def _moments(state: Any, held: Tensor) -> dict[str, Tensor]:
    """The optimiser state of a tensor, made as fused AdamW makes it at its first step."""
    if not state.get(held):
        state[held] = {"step": torch.zeros((), dtype=torch.float32, device=held.device)}
        state[held] |= {kind: torch.zeros_like(held.detach(), memory_format=torch.preserve_format) for kind in MOMENTS}
    seen: dict[str, Tensor] = state[held]
    return seen


def _host_copy(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.numel(), dtype=torch.float32, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)
