"""Silent processes are ended and named; those that answer, and those that are dead already, are left alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayActorError

from rlhf_dist.workers import heartbeat
from rlhf_dist.workers.heartbeat import Heartbeat


class Pulse:
    def __init__(self, answer: Callable[[], Any]) -> None:
        self.pulse, self.remote = self, lambda: answer


def silent() -> None:
    raise GetTimeoutError


def silent_then() -> Callable[[], None]:
    """Answers once, and never again."""
    answers = iter([None])

    def asked() -> None:
        for answer in answers:
            return answer
        raise GetTimeoutError

    return asked


def gone() -> None:
    raise RayActorError


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Actors that were ended. A reference is a function, which is called to get at its value."""
    found: list[Any] = []
    monkeypatch.setattr(heartbeat.ray, "wait", lambda asked, num_returns, timeout: (asked, []))
    monkeypatch.setattr(heartbeat.ray, "get", lambda reference, timeout: reference())
    monkeypatch.setattr(heartbeat.ray, "kill", found.append)
    return found


def test_a_silent_process_is_ended_and_named(killed: list[Any]) -> None:
    actors = [Pulse(lambda: 7), Pulse(gone), Pulse(silent_then()), Pulse(silent)]  # the last is not there yet: it loads
    watch = Heartbeat("value", actors, every_s=0.01, timeout_s=2.0)
    deadline = time.monotonic() + 10
    while not killed and time.monotonic() < deadline:
        time.sleep(0.01)
    watch.stop()
    watch.join(timeout=10)
    assert set(killed) == {actors[2]} and watch.reason == "value rank 2 gave no sign of life for 2 s and was ended"
    assert not watch.is_alive() and watch.daemon


def test_one_that_was_told_to_stop_ends_nobody(killed: list[Any]) -> None:
    watch = Heartbeat("value", [], every_s=1000.0, timeout_s=1.0)
    watch.stop()
    watch.join(timeout=10)
    watch._actors, watch._seen = [Pulse(silent)], {0}
    watch._look(0, silent)
    assert killed == [] and watch.reason == "" and not watch.is_alive()
