"""An engine: one sharded model and, if it trains, its optimiser. Five verbs; the quirks of the backend stay behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.contracts.tally import Tally

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class StepInfo:
    """What an optimizer step reports: gradient norm before clipping over all ranks, learning rate, and whether fp16 overflow skipped it."""

    grad_norm: float
    lr: float
    skipped: bool = False


class Objective(Protocol):
    """A loss on the outputs of a role's module."""

    def __call__(self, outputs: Outputs, microbatch: SequenceBatch) -> tuple[Tensor, Tally]:
        """Returns the loss summed (not averaged) over the microbatch, a scalar with gradient, and its metrics."""
        ...


class Engine(Protocol):
    """All methods are collective: every rank of the engine calls them in the same order. module: of the role, as the engine holds it."""

    rank: int
    world_size: int
    module: Any

    def forward(self, microbatches: Sequence[SequenceBatch]) -> list[Outputs]:
        """Outputs of each microbatch, without gradient. Ranks may pass different numbers, also none."""
        ...

    def forward_backward(self, microbatches: Sequence[SequenceBatch], objective: Objective, denominator: float) -> Tally:
        """Accumulates the gradient of Σ loss / denominator over all ranks and microbatches. The denominator is global."""
        ...

    def optimizer_step(self) -> StepInfo:
        """Clips, steps, advances the schedule, clears the gradient."""
        ...

    def export_weights(self, merged: bool = True, bucket_bytes: int = ...) -> Iterator[dict[str, Tensor]]:
        """Weights in buckets, on every rank: all of them under Hugging Face names, or the trained ones as they are.

        A bucket holds `bucket_bytes` at most; a larger weight travels alone.
        """
        ...

    def save(self, folder: Path) -> None:
        """Writes weights and optimiser state, shard by shard."""
        ...

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        ...
