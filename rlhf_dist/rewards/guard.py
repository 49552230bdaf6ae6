"""What happens when a reward fails: `raise | retry | drop_group | default`, the same for functions and endpoints (law 5).

A failure is a call that raises, runs out of time, dies, or answers with the wrong shape, and a row whose entry is NaN, infinite or no
number. Abstention (None) is none. A fault that no other try would mend, such as a missing column, is an error under every rule.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from rlhf_dist.config.rewards import FailureRules
from rlhf_dist.config.rewards import FunctionReward as FunctionSection
from rlhf_dist.contracts.reward import Attempt, RewardFailure, RewardRequest, RewardResult

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Before the first repetition, doubled before each further one, up to the longest."""
LONGEST_RETRY_AFTER_S = 60.0
"""Who asks us to wait longer (HTTP's Retry-After) is asked again after this."""
ISOLATION = 4.0
"""Finding out which rows of a failed call are at fault takes as many times `timeout_s` at most."""
SMALLEST_SHARE = 0.25
"""A part of a call gets this share of `timeout_s` at least, however few rows it has."""

Report = Callable[[Mapping[int, RewardFailure]], None]
"""Told which rows failed, and why, before anything is raised."""


class Fallible(Protocol):
    """A reward that can be tried.

    by_row: each row stands for itself, so that rows which failed may be sent again without the others. A function's call is repeated whole:
    it may compare the rows of a call.
    """

    name: str
    by_row: bool

    def attempt(self, request: RewardRequest, limit_s: float) -> Attempt:
        """One try."""
        ...

    def close(self) -> None:
        """Gives back what it holds."""
        ...


@dataclass
class _Judged:
    """What is known of a request's rows so far."""

    values: list[float | None]
    failures: dict[int, RewardFailure]
    retried: int = 0
    timeouts: int = 0

    def take(self, rows: Sequence[int], attempt: Attempt) -> None:
        """The latest try of these rows counts."""
        self.timeouts += attempt.timeouts
        for position, row in enumerate(rows):
            self.values[row] = attempt.values[position]
            self.failures.pop(row, None)
            if position in attempt.failures:
                self.failures[row] = attempt.failures[position]


class GuardedReward:
    """A reward with its rules for failures (contracts.reward.Reward).

    - `raise`: the first failure stops the run.
    - `retry`: the call is repeated up to `retries` times; then it stops the run.
    - `drop_group`, `default`: after `retries` repetitions the rows at fault are found: those whose entry is no score, and where the call
      failed as a whole, by calling with halves, quarters and so on, for 4 `timeout_s` at most. Rows not reached by then count as failed.
      Those rows alone fail: they have no value and take their groups along, or they get the default.

    Args:
        source: what is tried.
        rules: its section of the config.
        pause: waits so many seconds between tries.
    """

    def __init__(self, source: Fallible, rules: FailureRules, pause: Callable[[float], None] = time.sleep) -> None:
        self.name = source.name
        self._source, self._pause = source, pause
        self._timeout_s, self._retries = rules.timeout_s, rules.retries
        self._goes_on, self._default = rules.counts_failures, rules.default

    def __call__(self, request: RewardRequest, report: Report | None = None) -> RewardResult:
        """Scores every row.

        Args:
            request: at least one row. report: told which rows failed, also when the run stops because of them.

        Raises:
            UserError: a failure that stops the run, or a fault of the set-up.
        """
        judged = self._tried(request)
        if self._goes_on and not self._source.by_row:
            self._isolate(request, judged)
        if judged.failures and report is not None:
            report(dict(sorted(judged.failures.items())))
        if judged.failures and not self._goes_on:
            raise judged.failures[min(judged.failures)].error()
        return self._result(judged)

    def close(self) -> None:
        """Gives back what the reward holds."""
        self._source.close()

    def _tried(self, request: RewardRequest) -> _Judged:
        """The first try and its repetitions."""
        rows: Sequence[int] = range(len(request))
        judged = _Judged([None] * len(rows), {})
        judged.take(rows, self._source.attempt(request, self._timeout_s))
        for again in range(self._retries):
            hopeful = [failure for failure in judged.failures.values() if failure.retryable]
            if not hopeful:
                break
            self._pause(pause_before(again, hopeful))
            if self._source.by_row:
                rows = sorted(row for row, failure in judged.failures.items() if failure.retryable)
            attempt = self._source.attempt(request.select(rows), self._timeout_s)
            judged.retried += attempt.calls
            judged.take(rows, attempt)
        return judged

    def _isolate(self, request: RewardRequest, judged: _Judged) -> None:
        """Calls with ever smaller parts of a call that failed, until each row is judged or failed by itself.

        Larger parts come first, so that most rows have had their turn when time runs out.
        """
        if len(request) == 1 or not any(failure.of_call for failure in judged.failures.values()):
            return
        deadline = time.monotonic() + ISOLATION * self._timeout_s
        parts = deque(_halves(range(len(request))))
        while parts:
            rows = parts.popleft()
            limit_s = self._timeout_s * max(SMALLEST_SHARE, min(1.0, 2 * len(rows) / len(request)))
            if time.monotonic() + limit_s > deadline:
                judged.failures.update((row, _unreached(judged.failures[row])) for row in rows)
                continue
            attempt = self._source.attempt(request.select(rows), limit_s)
            judged.take(rows, attempt)
            if len(rows) > 1 and any(failure.of_call for failure in attempt.failures.values()):
                parts += _halves(rows)

    def _result(self, judged: _Judged) -> RewardResult:
        rows = tuple(sorted(judged.failures))
        values = tuple(self._default if row in judged.failures else value for row, value in enumerate(judged.values))
        failed, defaulted = (rows, ()) if self._default is None else ((), rows)
        return RewardResult(self.name, values, failed, defaulted, judged.retried, judged.timeouts)


def pause_before(again: int, failures: Sequence[RewardFailure]) -> float:
    """Seconds before repetition `again`, from 0: doubling, without chance, and as long as the other side asked for, within bounds."""
    asked = max(failure.retry_after_s for failure in failures)
    return max(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**again), min(LONGEST_RETRY_AFTER_S, asked))


def longest_judging_s(rules: FailureRules) -> float:
    """The longest that one call may take with all that follows a failure: its repetitions, pauses (without what another side may ask
    for), and finding out which rows are at fault. Loading a function anew comes on top; an endpoint takes so long for each request."""
    isolation = ISOLATION if isinstance(rules, FunctionSection) and rules.counts_failures else 0.0
    pauses = sum(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**again) for again in range(rules.retries))
    return rules.timeout_s * (1 + rules.retries + isolation) + pauses


def _halves(rows: Sequence[int]) -> list[Sequence[int]]:
    middle = (len(rows) + 1) // 2
    return [rows[:middle], rows[middle:]]


def _unreached(of_call: RewardFailure) -> RewardFailure:
    what = f"{of_call.what}; whether this row is to blame was not found out in time"
    return replace(of_call, kind="not_isolated", what=what)
