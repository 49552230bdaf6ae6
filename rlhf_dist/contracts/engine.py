"""An engine: one sharded model and, if it trains, its optimiser. Forward, backward, step, export, save and load; the quirks of the backend
stay behind them."""

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
    """What an optimizer step reports.

    grad_norm: over all ranks, before clipping; not finite where the gradient was not. lr: learning rate. skipped: the gradient was not
    finite, so weights and moments were left as they were. overflow: that is what fp16 does while it looks for its loss scale.
    """

    grad_norm: float
    lr: float
    skipped: bool = False
    overflow: bool = False


@dataclass(frozen=True)
class SavedFile:
    """A file of a checkpoint, on disk for good. name: relative to its folder. sha256: of its bytes, in hexadecimal."""

    name: str
    bytes: int
    sha256: str


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
        """Accumulates the gradient of Σ loss / denominator over all ranks and microbatches. The denominator is global.

        A loss that is not finite, on one rank, makes the gradient not finite on all: the step that follows is skipped.
        """
        ...

    def optimizer_step(self) -> StepInfo:
        """Clips, steps, advances the schedule, clears the gradient. A gradient that is not finite changes nothing but the schedule."""
        ...

    def unsound_weights(self) -> str:
        """The first trained weight of which this rank holds a number that is not finite; empty where there is none. Not collective."""
        ...

    def any_rank(self, mine: bool) -> bool:
        """Whether it is so on some rank."""
        ...

    def export_weights(self, merged: bool = True, bucket_bytes: int = ...) -> Iterator[dict[str, Tensor]]:
        """Weights in buckets, on every rank: all of them under Hugging Face names, or the trained ones as they are.

        A bucket holds `bucket_bytes` at most; a larger weight travels alone.
        """
        ...

    def begin_save(self, folder: Path) -> None:
        """Copies what this rank has of trained weights and optimiser state; a thread writes it into the folder while training goes on.

        One save at a time: a second waits until the first is written.
        """
        ...

    def saved(self, wait: bool) -> tuple[SavedFile, ...] | None:
        """The files that this rank's last save wrote, durable; None while it is still writing and the caller does not wait.

        Raises:
            UserError: the save failed.
        """
        ...

    def load(self, folder: Path) -> None:
        """Restores what a save wrote, of any number of ranks; a pending gradient is dropped."""
        ...
