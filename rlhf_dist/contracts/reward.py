"""The reward contract: named results, abstention apart from failure, columns passed through."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlhf_dist.config.errors import UserError


@dataclass(frozen=True)
class RewardRequest:
    """Rows to judge.

    prompts, completions: text. columns: the other columns of the data rows.
    """

    prompts: Sequence[str]
    completions: Sequence[str]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class RewardResult:
    """One reward's raw scores: a finite number, or None where it abstains."""

    name: str
    values: tuple[float | None, ...]


class Reward(Protocol):
    """Anything that scores text on the rank that owns the sample."""

    name: str

    def __call__(self, request: RewardRequest) -> RewardResult:
        """Scores every row.

        Raises:
            UserError: the reward failed. A failure is never turned into a number.
        """
        ...


def checked_result(name: str, values: Any, expected: int, where: str) -> RewardResult:
    """Holds what a reward returned to the contract.

    Raises:
        UserError: not a list, wrong length, an entry that is neither a finite number nor None.
    """
    unordered = isinstance(values, str | bytes | Mapping | Set)
    if unordered or not hasattr(values, "__len__") or not hasattr(values, "__iter__") or getattr(values, "ndim", 1) == 0:
        raise UserError(
            f"reward {name!r} returned {type(values).__name__}, not a list of numbers",
            where=where,
            fix="return one float (or None to abstain) per completion",
        )
    if len(values) != expected:
        raise UserError(
            f"reward {name!r} returned {len(values)} values for {expected} completions",
            where=where,
            fix="return exactly one value per completion, None to abstain",
        )
    return RewardResult(name, tuple(_checked_value(name, value, row, where) for row, value in enumerate(values)))


def _checked_value(name: str, value: Any, row: int, where: str) -> float | None:
    if value is None:
        return None
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UserError(
            f"reward {name!r} returned {value!r} ({type(value).__name__}) for row {row}",
            where=where,
            fix="return a float, or None to abstain",
        )
    if not math.isfinite(value):
        raise UserError(
            f"reward {name!r} returned {float(value)} for row {row}: a failure, not a score",
            where=where,
            fix="find out why; return None if the reward cannot judge the row",
        )
    return float(value)
