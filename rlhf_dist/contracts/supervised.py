"""What a supervised loop may ask of its workers, and the small records that come back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rlhf_dist.contracts.flops import FlopModel
from rlhf_dist.contracts.roles import SavedRole, UpdateInfo, UpdateRequest
from rlhf_dist.contracts.tally import Tally

Side = Literal["train", "eval"]
PairLogprobs = tuple[float, float]
"""What the reference says of a pair: log-probability of the chosen and of the rejected answer, in nats."""


@dataclass(frozen=True)
class RowFacts:
    """What the schedule needs, one number a row: tokens (the cost) and trained units (the weight in the loss).

    fates: rows dropped or cut, by reason. facts: worth showing. eval_fates: of `fates`, what befell held-out rows.
    costs: of a row as a forward; None: tokens alone count.
    """

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    eval_lengths: tuple[int, ...]
    fates: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    eval_fates: dict[str, int] = field(default_factory=dict)
    costs: FlopModel | None = None

    @property
    def train_fates(self) -> dict[str, int]:
        """Of `fates`, what befell training rows."""
        rest = {reason: count - self.eval_fates.get(reason, 0) for reason, count in self.fates.items()}
        return {reason: count for reason, count in rest.items() if count}


class SupervisedRole(SavedRole, Protocol):
    """One model that learns from rows it has read itself; rows are named by number, the same on every rank."""

    def describe(self) -> RowFacts:
        """Lengths and weights of all rows."""
        ...

    def update(self, request: UpdateRequest) -> UpdateInfo:
        """Collective. One optimizer step."""
        ...

    def evaluate(self, microbatches: tuple[tuple[int, ...], ...]) -> Tally:
        """Collective. Metrics of held-out rows, without learning."""
        ...

    def export(self, folder: str) -> None:
        """Collective. Writes a Hugging Face folder (rank 0)."""
        ...


class ReferencedRole(SupervisedRole, Protocol):
    """One that learns relative to a frozen reference, asked once about all rows before the first step."""

    def ask_reference(self, side: Side, microbatches: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, PairLogprobs], ...]:
        """Collective. What the reference says of some rows of a side, by row number."""
        ...

    def keep_reference(self, train: tuple[PairLogprobs, ...], evaluation: tuple[PairLogprobs, ...]) -> None:
        """Takes in what it says of all rows of both sides, in order, and lets the reference go."""
        ...


class RewardModelRole(SupervisedRole, Protocol):
    """A reward model in training."""

    def judge(self, side: Side, microbatches: tuple[tuple[int, ...], ...]) -> tuple[Any, ...]:
        """Collective. Rows of one side as `evaluation.judged.JudgedPair`s: a few numbers each, with the scores as they are now."""
        ...
