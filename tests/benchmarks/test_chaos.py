"""Deaths as drawn, and what is made of the log of a run that had them. A real run: `tests/distributed/test_chaos.py`."""

from __future__ import annotations

from typing import Any

import pytest
from chaos import EVERY, deaths, plan_kills, table
from sabotage import COORDINATOR, EVERYTHING

RANKS = {"policy 0", "policy 1", "value 0", "reference 0", "reward 0"}


@pytest.mark.parametrize("stale", [False, True])
def test_all_victims_die_at_calls_of_all_phases_and_none_at_the_same(stale: bool) -> None:
    plan = plan_kills(60, 30, 1, stale)
    assert plan == plan_kills(60, 30, 1, stale) != plan_kills(60, 30, 2, stale)
    assert len({(kill.step, kill.call, kill.nth) for kill in plan}) == 60 and plan == sorted(plan, key=lambda kill: kill.number)
    assert {kill.victim for kill in plan} == RANKS | {COORDINATOR, EVERYTHING} | ({"rollout 0"} if stale else set())
    phases = {kill.call.split(".")[1] for kill in plan}
    assert {"generate", "score", "judge", "estimate", "update", "write_rollouts"} < phases and ("send_weights" in phases) == stale
    for kill in plan:
        assert kill.step < 30 and kill.delay_s < 0.1
        assert not kill.call.endswith("begin_save") or (kill.step + 1) % EVERY == 0, "only where a checkpoint is taken"


def at(time: float, kind: str, text: str = "", **rest: Any) -> dict[str, Any]:
    return {"time": time, "kind": kind} | ({"text": text} if text else {}) | rest


def kill(time: float, victim: str) -> dict[str, Any]:
    return at(time, "kill", victim=victim, call="policy.update", step=0, delay_s=-1.0)


def test_the_run_stands_still_from_the_last_progress_until_it_is_at_work_again() -> None:
    events = [
        at(0.0, "starts", step=0),
        at(1.0, "begins", step=0),
        kill(2.0, "reward 0"),  # its answers are there: the step goes on, and it is missed in the next
        at(3.0, "done", step=1),
        at(3.5, "begins", step=1),
        at(4.0, "message", "recovering in step 2, phase score: gone (reward rank 0)"),
        at(6.0, "message", "recovered in 2.0 s: rebuilt reward; sampled 0 steps again, asked 2 times again"),
        kill(7.0, "policy 1"),
        at(7.5, "message", "recovering in step 2, phase train: gone (policy rank 1)"),
        at(8.5, "message", "recovering in step 2, phase train: gone again (policy rank 0)"),
        at(9.0, "message", "recovered in 0.5 s: rebuilt policy, value, back to the beginning"),
        at(9.2, "message", "preflight passed: ratio/mean 0"),
        at(9.5, "begins", step=0),
        kill(10.0, "coordinator"),
        at(14.0, "starts", step=2),
        at(14.5, "message", "resumed after step 2"),
        at(15.0, "message", "preflight passed: ratio/mean 0"),
        at(15.1, "begins", step=2),
        kill(16.0, "reference 0"),
        at(17.0, "done", step=3),
    ]
    found = deaths(events)
    assert [(each["victim"], each["seconds"]) for each in found] == [
        ("reward 0", 2.5), ("policy 1", pytest.approx(2.2)), ("coordinator", 5.0), ("reference 0", None)
    ]  # fmt: skip
    assert [each["how"].split(";")[0] for each in found] == [
        "rebuilt reward", "rebuilt policy, value, back to the beginning", "started again after step 2", "nobody missed it"
    ]  # fmt: skip
    assert table(found).row_count == 4
