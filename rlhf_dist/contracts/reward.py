"""The reward contract: named results, abstention apart from failure, columns passed through.

A reward may judge a row (a finite number), abstain on it (None), or fail on it. A failure is a record of its own, never a number.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rlhf_dist.config.errors import UserError

FailureKind = Literal["exception", "timeout", "death", "shape", "value", "http", "not_isolated"]
"""exception: it raised; timeout: it did not answer in time; death: its process ended; shape: not a list of one entry a row; value: an entry
that is neither a finite number nor None; http: the endpoint did not answer as agreed; not_isolated: the time for finding out which rows of
a failed call are at fault was over before this row's turn."""


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

    def select(self, rows: Sequence[int]) -> RewardRequest:
        """The given rows in the given order."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return RewardRequest([self.prompts[row] for row in rows], [self.completions[row] for row in rows], columns)


@dataclass(frozen=True)
class RewardResult:
    """One reward's raw scores: a finite number, or None where it abstains or failed.

    failed: positions without a value because the reward failed there: their groups must go.
    defaulted: positions where it failed and the value is the configured default.
    retried: calls (HTTP: requests) that were made again. timeouts: calls (HTTP: requests) that did not answer in time.
    """

    name: str
    values: tuple[float | None, ...]
    failed: tuple[int, ...] = ()
    defaulted: tuple[int, ...] = ()
    retried: int = 0
    timeouts: int = 0


@dataclass(frozen=True)
class RewardFailure:
    """Why a reward has no value for a row.

    what, where, fix: as in `UserError`. trace: the traceback, where there is one. rows: how many rows the failed call had.
    of_call: the call failed as a whole, so that nobody knows yet which of them is to blame. retryable: whether the same call may go well
    another time. retry_after_s: how long the other side asked to wait.
    """

    kind: FailureKind
    what: str
    where: str = ""
    fix: str = ""
    trace: str = ""
    rows: int = 1
    of_call: bool = False
    retryable: bool = True
    retry_after_s: float = 0.0

    def error(self) -> UserError:
        """What stops the run."""
        return UserError(self.what, where=self.where, fix=self.fix)


@dataclass(frozen=True)
class Attempt:
    """What one try gave: values (None: abstains, or see `failures`), failures by row, calls made and calls that ran out of time."""

    values: tuple[float | None, ...]
    failures: Mapping[int, RewardFailure] = field(default_factory=dict)
    calls: int = 1
    timeouts: int = 0

    @classmethod
    def failed(cls, rows: int, failure: RewardFailure) -> Attempt:
        """A call of so many rows that failed as a whole."""
        return cls((None,) * rows, dict.fromkeys(range(rows), failure), timeouts=int(failure.kind == "timeout"))


class Reward(Protocol):
    """Anything that scores text on the rank that owns the sample."""

    name: str

    def __call__(self, request: RewardRequest) -> RewardResult:
        """Scores every row.

        Raises:
            UserError: the reward failed, and its failures stop the run. A failure is never turned into a number nobody asked for.
        """
        ...


def checked_result(name: str, values: Any, expected: int, where: str) -> RewardResult:
    """Holds what a reward returned to the contract, where any failure is an error.

    Raises:
        UserError: not a list, wrong length, an entry that is neither a finite number nor None.
    """
    attempt = checked_attempt(name, values, expected, where)
    for failure in attempt.failures.values():
        raise failure.error()
    return RewardResult(name, attempt.values)


def checked_attempt(name: str, values: Any, expected: int, where: str) -> Attempt:
    """Holds what a reward returned to the contract: a call that fails as a whole, or rows that fail."""
    unordered = isinstance(values, str | bytes | Mapping | Set)
    if unordered or not hasattr(values, "__len__") or not hasattr(values, "__iter__") or getattr(values, "ndim", 1) == 0:
        what, fix = f"returned {type(values).__name__}, not a list of numbers", "return one float (or None to abstain) per completion"
        return _misshapen(name, what, expected, where, fix)
    entries = list(values)
    if len(entries) != expected:
        what, fix = f"returned {len(entries)} values for {expected} completions", "return exactly one value per completion, None to abstain"
        return _misshapen(name, what, expected, where, fix)
    scores: list[float | None] = []
    failures: dict[int, RewardFailure] = {}
    for row, value in enumerate(entries):
        score, fault = _checked_value(value)
        scores.append(score)
        if fault:
            what = f"reward {name!r} returned {fault[0]} for row {row}" + fault[1]
            failures[row] = RewardFailure("value", what, where, fault[2], rows=expected)
    return Attempt(tuple(scores), failures)


def _misshapen(name: str, what: str, rows: int, where: str, fix: str) -> Attempt:
    return Attempt.failed(rows, RewardFailure("shape", f"reward {name!r} {what}", where, fix, rows=rows, of_call=True))


def _checked_value(value: Any) -> tuple[float | None, tuple[str, str, str] | None]:
    """The score; or what was returned, what that means, and what to do."""
    if value is None:
        return None, None
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None, (f"{_shown(value)} ({type(value).__name__})", "", "return a float, or None to abstain")
    try:
        number = float(value)
    except OverflowError:
        return None, ("a number beyond the largest float", ": a failure, not a score", "return a finite number")
    if not math.isfinite(number):
        return None, (str(number), ": a failure, not a score", "find out why; return None if the reward cannot judge the row")
    return number, None


def _shown(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"
