"""What a supervised loop may ask of its workers, and the small records that come back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from rlhf_dist.contracts.roles import UpdateInfo, UpdateRequest
from rlhf_dist.contracts.tally import Tally


@dataclass(frozen=True)
class RowFacts:
    """What the schedule needs, one number a row: tokens (the cost) and trained units (the weight in the loss).

    fates: rows dropped or cut, by reason. facts: worth showing.
    """

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    eval_lengths: tuple[int, ...]
    fates: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class SupervisedRole(Protocol):
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
