"""The rules for failures, on a reward that fails as told: what is repeated, what is isolated, what is counted, what stops the run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.rewards import FunctionReward, HttpReward
from rlhf_dist.contracts.reward import Attempt, RewardFailure, RewardRequest, RewardResult
from rlhf_dist.rewards import guard
from rlhf_dist.rewards.guard import GuardedReward, longest_judging_s, pause_before


@dataclass
class Scripted:
    """A reward that scores the text of a completion. bad: those on which a call fails as a whole; nan: those whose row fails.

    calls: the completions of each call, with its time limit. mended_after: so many calls fail, then none.
    """

    bad: frozenset[str] = frozenset()
    nan: frozenset[str] = frozenset()
    kind: Any = "exception"
    retryable: bool = True
    mended_after: int | None = None
    by_row: bool = False
    name: str = "r"
    calls: list[tuple[tuple[str, ...], float]] = field(default_factory=list)
    clock: list[float] | None = None

    def attempt(self, request: RewardRequest, limit_s: float) -> Attempt:
        texts = tuple(request.completions)
        self.calls.append((texts, limit_s))
        mended = self.mended_after is not None and len(self.calls) > self.mended_after
        if self.bad & set(texts) and not mended:
            if self.clock is not None:
                self.clock[0] += limit_s
            return Attempt.failed(len(texts), self._failure(len(texts), of_call=True))
        faults = {} if mended else {row: self._failure(len(texts)) for row, text in enumerate(texts) if text in self.nan}
        return Attempt(tuple(None if row in faults else float(text) for row, text in enumerate(texts)), faults)

    def close(self) -> None:
        pass

    def _failure(self, rows: int, of_call: bool = False) -> RewardFailure:
        return RewardFailure(self.kind, "broken", "here", "mend", rows=rows, of_call=of_call, retryable=self.retryable)


def rules(**given: Any) -> FunctionReward:
    return FunctionReward.model_validate({"kind": "function", "name": "r", "path": "m:f", **given})


def request(rows: int | Sequence[str]) -> RewardRequest:
    texts = [str(row) for row in range(rows)] if isinstance(rows, int) else list(rows)
    return RewardRequest([f"p{text}" for text in texts], texts)


def ask(source: Scripted, rows: int = 4, pauses: list[float] | None = None, report: Any = None, **given: Any) -> RewardResult:
    return GuardedReward(source, rules(**given), pause=(pauses if pauses is not None else []).append)(request(rows), report)


def test_without_failures_there_is_one_call_with_the_whole_time() -> None:
    source = Scripted()
    assert ask(source, on_failure="retry", retries=3, timeout_s=7.0) == RewardResult("r", (0.0, 1.0, 2.0, 3.0))
    assert source.calls == [(("0", "1", "2", "3"), 7.0)]


def test_raise_reports_all_rows_of_the_call_and_stops_at_once() -> None:
    source, seen = Scripted(frozenset("2")), []
    with pytest.raises(UserError, match="broken"):
        ask(source, report=seen.append)
    assert len(source.calls) == 1 and list(seen[0]) == [0, 1, 2, 3]
    assert seen[0][0].rows == 4 and seen[0][0].of_call


def test_raise_reports_only_the_row_at_fault_where_it_is_known() -> None:
    seen: list[Any] = []
    with pytest.raises(UserError):
        ask(Scripted(nan=frozenset("2")), report=seen.append)
    assert list(seen[0]) == [2]


@pytest.mark.parametrize("broken", [{"bad": frozenset("2")}, {"nan": frozenset("2")}])
def test_retry_repeats_the_whole_call_with_growing_pauses_and_counts(broken: dict[str, Any]) -> None:
    source, pauses = Scripted(mended_after=2, **broken), []
    result = ask(source, pauses=pauses, on_failure="retry", retries=3)
    assert result == RewardResult("r", (0.0, 1.0, 2.0, 3.0), retried=2)
    assert [texts for texts, _ in source.calls] == [("0", "1", "2", "3")] * 3 and pauses == [0.5, 1.0]


def test_retry_raises_when_its_tries_are_spent() -> None:
    source = Scripted(frozenset("2"))
    with pytest.raises(UserError):
        ask(source, on_failure="retry", retries=2)
    assert len(source.calls) == 3


def test_what_no_other_try_would_mend_is_not_repeated() -> None:
    source = Scripted(frozenset("2"), retryable=False)
    with pytest.raises(UserError):
        ask(source, on_failure="retry", retries=2)
    assert len(source.calls) == 1


def test_rows_that_stand_for_themselves_are_sent_again_alone() -> None:
    source = Scripted(nan=frozenset("13"), mended_after=1, by_row=True)
    assert ask(source, on_failure="retry", retries=1).values == (0.0, 1.0, 2.0, 3.0)
    assert [texts for texts, _ in source.calls] == [("0", "1", "2", "3"), ("1", "3")]


def test_a_request_of_an_endpoint_is_not_cut_further() -> None:
    source = Scripted(frozenset("2"), by_row=True)
    assert ask(source, on_failure="drop_group").failed == (0, 1, 2, 3) and len(source.calls) == 1


@given(
    st.integers(1, 40).flatmap(lambda rows: st.tuples(st.just(rows), st.sets(st.integers(0, rows - 1)), st.sets(st.integers(0, rows - 1))))
)
def test_exactly_the_rows_at_fault_are_found_in_a_bounded_number_of_calls(drawn: tuple[int, set[int], set[int]]) -> None:
    rows, bad, nan = drawn
    at_fault = tuple(sorted(bad | nan))
    source = Scripted(frozenset(map(str, bad)), frozenset(map(str, nan)))
    result = ask(source, rows, on_failure="drop_group")
    assert result.failed == at_fault and result.defaulted == ()
    assert result.values == tuple(None if row in at_fault else float(row) for row in range(rows))
    assert len(source.calls) <= 1 + 2 * max(1, len(bad)) * rows.bit_length()
    defaulted = ask(Scripted(frozenset(map(str, bad)), frozenset(map(str, nan))), rows, on_failure="default", default=-7.0)
    assert defaulted.defaulted == at_fault and defaulted.failed == ()
    assert defaulted.values == tuple(-7.0 if row in at_fault else float(row) for row in range(rows))


def test_repetitions_come_before_isolation_and_calls_of_isolation_are_no_repetitions() -> None:
    source = Scripted(frozenset("3"))
    result = ask(source, on_failure="drop_group", retries=2)
    assert [len(texts) for texts, _ in source.calls] == [4, 4, 4, 2, 2, 1, 1]
    assert (result.failed, result.retried) == ((3,), 2)


@pytest.mark.parametrize("rows", [2, 64, 1000])
@pytest.mark.parametrize("hanging", [1, 3, 10_000])
def test_finding_rows_that_hang_takes_no_longer_than_promised(rows: int, hanging: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(guard.time, "monotonic", lambda: clock[0])
    stuck = {str(row * 7 % rows) for row in range(hanging)}
    source = Scripted(frozenset(stuck), kind="timeout", clock=clock)
    seen: list[Any] = []
    result = ask(source, rows, report=seen.append, on_failure="drop_group", timeout_s=10.0)
    assert clock[0] <= longest_judging_s(rules(on_failure="drop_group", timeout_s=10.0)) == 50.0
    assert {str(row) for row in result.failed} >= stuck & {str(row) for row in range(rows)}
    assert result.timeouts == sum(bool(stuck & set(texts)) for texts, _ in source.calls)
    if hanging == 1:
        assert result.failed == (0,), "one row is found in any call"
    assert {failure.kind for failure in seen[0].values()} <= {"timeout", "not_isolated"}


def test_pauses_grow_without_chance_and_within_bounds() -> None:
    failure = RewardFailure("http", "x")
    assert [pause_before(again, [failure]) for again in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    asked = [RewardFailure("http", "x", retry_after_s=seconds) for seconds in (3.0, 7.0)]
    assert pause_before(0, asked) == 7.0 and pause_before(4, asked) == 8.0
    assert pause_before(0, [RewardFailure("http", "x", retry_after_s=1e9)]) == guard.LONGEST_RETRY_AFTER_S


@pytest.mark.parametrize(
    "section, seconds",
    [
        (rules(timeout_s=10.0), 10.0),
        (rules(timeout_s=10.0, on_failure="retry", retries=2), 31.5),
        (rules(timeout_s=10.0, on_failure="default", default=0.5), 50.0),
        (HttpReward(kind="http", name="r", url="http://h/", timeout_s=10.0), 43.5),
        (HttpReward(kind="http", name="r", url="http://h/", timeout_s=10.0, on_failure="drop_group", retries=0), 10.0),
    ],
)
def test_the_longest_judging(section: Any, seconds: float) -> None:
    assert longest_judging_s(section) == seconds


def test_a_fault_of_the_set_up_stops_the_run_under_every_rule() -> None:
    def refuse(*_: Any) -> Attempt:
        raise UserError("no such column")

    refusing: Callable[..., Attempt] = refuse
    for chosen in ({}, {"on_failure": "retry", "retries": 1}, {"on_failure": "drop_group"}, {"on_failure": "default", "default": 1.0}):
        source = Scripted()
        source.attempt = refusing  # type: ignore[method-assign]
        with pytest.raises(UserError, match="no such column"):
            ask(source, **chosen)
