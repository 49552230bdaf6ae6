"""One rank's process answers while it is at work. The class inside the actor, without Ray; `test_ray_group` has it in real processes."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.contracts.group import Stored
from rlhf_dist.engines.process import Rank
from rlhf_dist.workers import host
from rlhf_dist.workers.host import Host
from rlhf_dist.workers.wire import pack


class Worker:
    def __init__(self, rank: Rank) -> None:
        self.rank, self.entered, self.leaves = rank, threading.Event(), threading.Event()

    def make(self, value: int) -> Stored[list[int], int]:
        return Stored([value], value)

    def users_reward(self) -> None:
        self.entered.set()
        self.leaves.wait(30)

    def broken(self) -> None:
        raise ZeroDivisionError("inside")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(host.ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    made = Host.__ray_metadata__.modified_class(str(tmp_path))
    made.start((0, 1, "127.0.0.1", 1), Worker, True, 5.0)
    return made


def arguments(*given: Any) -> bytes:
    return pack(given, lambda value: None)[0]


def test_between_calls_it_says_so(here: Any) -> None:
    report = here.report(3)
    assert (report.rank, report.answered, report.method, report.calls, report.seconds) == (3, True, "", 1, 0.0)
    assert report.where == f"10.0.0.7, process {os.getpid()}" and here.pulse() == os.getpid()
    payload, _ = here.invoke("make", arguments(5))
    assert payload == [5] and here.report(0).calls == 2


def test_in_a_call_it_names_it_and_shows_where_it_stands(here: Any) -> None:
    thread = threading.Thread(target=here.invoke, args=("users_reward", arguments()), name="the worker's")
    thread.start()
    here._worker.entered.wait(10)
    report = here.report(0)
    here._worker.leaves.set()
    thread.join()
    assert report.method == "users_reward" and report.seconds >= 0
    assert "thread the worker's" in report.stack and "self.leaves.wait(30)" in report.stack
    assert here.report(0).method == ""


def test_after_a_failure_it_is_between_calls(here: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        here.invoke("broken", arguments())
    assert here.report(0).method == ""
