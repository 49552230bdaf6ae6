from __future__ import annotations

import time

import pytest

from rlhf_dist.runs.clock import Clock


def test_a_phase_takes_the_time_it_took_even_when_it_fails() -> None:
    clock = Clock()
    with clock.phase("generate"):
        time.sleep(0.02)
    first = clock.seconds["generate"]
    with pytest.raises(KeyError), clock.phase("generate"):
        time.sleep(0.02)
        raise KeyError
    assert 0.02 <= first < 0.5
    assert first + 0.02 <= clock.seconds["generate"] < 1.0


def test_metrics_are_plain_quotients() -> None:
    clock = Clock({"generate": 2.0, "train": 3.0}, tokens=60)
    assert clock.throughput() == {"generate": 30.0, "train": 20.0}
    assert clock.metrics() == {
        "perf/generate_seconds": 2.0,
        "perf/train_seconds": 3.0,
        "perf/generate_tokens_per_second": 30.0,
        "perf/train_tokens_per_second": 20.0,
        "perf/step_seconds": 5.0,
        "perf/tokens_per_second": 12.0,
    }


def test_the_speed_of_a_hidden_phase_is_that_of_its_workers() -> None:
    """Two seconds of sampling, of which half a second was waited for."""
    clock = Clock({"generate": 0.5, "train": 3.0}, tokens=60, worked={"generate": 2.0})
    metrics = clock.metrics()
    assert (metrics["perf/generate_seconds"], metrics["perf/generate_worked_seconds"]) == (0.5, 2.0)
    assert metrics["perf/generate_tokens_per_second"] == 30.0 and metrics["perf/step_seconds"] == 3.5
    run = Clock()
    run.add(clock)
    run.add(clock)
    assert run.worked == {"generate": 4.0} and run.throughput() == {"generate": 30.0, "train": 20.0}


def test_nothing_is_divided_by_nothing() -> None:
    assert Clock().metrics() == {"perf/step_seconds": 0.0, "perf/tokens_per_second": 0.0}
    assert Clock({"sync": 0.0}, tokens=5).throughput() == {}
    assert Clock({"sync": 1.0}).throughput() == {}


def test_a_run_adds_up_its_steps() -> None:
    run = Clock()
    run.add(Clock({"generate": 2.0}, tokens=10))
    run.add(Clock({"generate": 1.0, "train": 1.0}, tokens=20))
    assert run.seconds == {"generate": 3.0, "train": 1.0}
    assert run.throughput() == {"generate": 10.0, "train": 30.0}
