"""The coordinator's share: what is left of an iteration when every moment in which some worker was busy is taken away."""

from __future__ import annotations

import time

import pytest
from busy import IterationReporter, WatchedWorker, idle_shares, union_seconds

from rlhf_dist.runs.progress import NullReporter


def test_overlaps_count_once_and_what_lies_outside_the_window_not_at_all() -> None:
    busy = [(0.0, 3.0), (2.0, 4.0), (2.5, 3.0), (6.0, 7.0), (9.0, 12.0), (20.0, 30.0), (-5.0, -1.0)]
    assert union_seconds(busy, (1.0, 10.0)) == 3 + 1 + 1
    assert union_seconds([], (1.0, 10.0)) == 0


def test_a_moment_is_idle_only_if_no_role_and_no_rank_is_busy() -> None:
    busy = {"policy": [[(0.0, 4.0)], [(3.0, 6.0)]], "value": [[(5.0, 8.0), (11.0, 12.0)]]}
    assert idle_shares([(0.0, 10.0), (10.0, 20.0)], busy) == [pytest.approx(0.2), pytest.approx(0.9)]


def test_a_watched_worker_answers_as_before_and_remembers_when_it_was_busy() -> None:
    class Worker:
        name = "policy"

        def nap(self, seconds: float) -> str:
            time.sleep(seconds)
            return "rested"

        def fail(self) -> None:
            raise ValueError("no")

    watched = WatchedWorker(Worker())
    before = time.time()
    assert watched.nap(0.02) == "rested" and watched.name == "policy"
    with pytest.raises(ValueError):
        watched.fail()
    (began, ended), failed = watched.busy_intervals()
    assert before <= began and ended - began >= 0.02
    assert failed[0] >= ended  # a call that fails was work too


def test_an_iteration_lasts_from_its_first_phase_to_its_metrics_and_excludes_the_evaluation() -> None:
    reporter = IterationReporter(NullReporter())
    reporter.message("preflight")
    reporter.phase(0, "generate")
    reporter.phase(0, "train")
    time.sleep(0.02)
    reporter.phase(0, "evaluate")
    evaluated = time.time()
    time.sleep(0.02)
    reporter.step(1, 2, {})
    reporter.phase(1, "generate")
    reporter.step(2, 2, {})
    (first, second) = reporter.iterations
    assert first[1] - first[0] >= 0.02 and first[1] <= evaluated
    assert second[0] >= evaluated + 0.02
