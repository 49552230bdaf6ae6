"""One fault at a time, at every moment of a run: who is started anew, what is done again, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.coordinator import lifecycle

Run = Callable[..., Any]
STARTED = 20.0
"""Virtual seconds after which the first step is under way in every one of these runs."""


@pytest.fixture
def run(schedules: Any) -> Run:
    """`run(faults as (time, kind, group, ...), **setting)`: a checked run."""

    def checked(faults: Sequence[tuple[Any, ...]], bad_starts: dict[str, int] | None = None, seed: int = 0, **named: Any) -> Any:
        setting = schedules.fakes.Setting(**named)
        world = schedules.world(seed, [schedules.fakes.Fault(*fault) for fault in faults], bad_starts)
        outcome = schedules.run(setting, world)
        schedules.check(setting, outcome)
        return outcome

    return checked


def moments(count: int) -> list[float]:
    """From the first step to the last."""
    return [STARTED + 65.0 * number / count for number in range(count)]


def said(outcome: Any, beginning: str) -> list[str]:
    return [text for text in outcome.said if text.startswith(beginning)]


@pytest.mark.parametrize("role", ["reference", "reward"])
@pytest.mark.parametrize("node", [False, True], ids=["process", "machine"])
def test_who_does_not_learn_is_replaced_and_nothing_else_notices(run: Run, role: str, node: bool) -> None:
    recovered = []
    for moment in moments(20):
        outcome = run([(moment, "kill", role, 1, node)], staleness=1)
        assert outcome.ends == ["finished"] and not [text for text in outcome.said if "back to" in text]
        recovered += said(outcome, "recovered in")
    assert len(recovered) >= 15 and all(f"rebuilt {role}; sampled 0 steps" in text for text in recovered)


def test_a_dead_rollout_rank_is_replaced_unless_the_policy_that_sampled_is_no_more(run: Run) -> None:
    """Sampling ahead (staleness 1), it samples for a version that is gone once the step that trains meanwhile is over."""
    texts = {
        staleness: [text for moment in moments(30) for text in said(run([(moment, "kill", "rollout", 0)], **given), "recovered in")]
        for staleness in (0, 1)
        for given in [{"rollout": "broadcast", "staleness": staleness}]
    }
    again = {staleness: [text for text in found if "rebuilt rollout; sampled" in text] for staleness, found in texts.items()}
    back = {staleness: [text for text in found if "rebuilt policy, value, rollout, back to" in text] for staleness, found in texts.items()}
    assert all(len(again[staleness]) + len(back[staleness]) == len(texts[staleness]) for staleness in texts)
    assert len(again[0]) > len(back[0]) > 0 and len(back[1]) > 5
    assert [text for text in again[0] if "sampled 1 steps" in text]


@pytest.mark.parametrize("role", ["policy", "value"])
@pytest.mark.parametrize("kind", ["kill", "hang"])
def test_policy_and_value_go_back_together(run: Run, role: str, kind: str) -> None:
    steps = set()
    for moment in moments(12):
        outcome = run([(moment, kind, role, 1)])
        texts = said(outcome, "recovered in")
        assert outcome.ends == ["finished"] and all("rebuilt policy, value" in text and ", back to" in text for text in texts)
        steps |= {text.split("back to ")[1] for text in texts}
    assert steps >= {"the beginning", "step 1", "step 2", "step 3"}


def test_of_stuck_ranks_a_report_is_written(run: Run) -> None:
    outcome = run([(50.0, "hang", "value", 1)])
    (name, text), *_ = outcome.reports.items()
    assert name.startswith("stuck_step_00000") and "no answer within 100 s" in text and "value rank 1" in text
    assert "policy: idle" in text and "value: working" in text and "phase" in text
    assert said(outcome, f"stuck: what every process is at stands in {name}")


def test_who_was_late_but_is_there_is_asked_again(run: Run) -> None:
    outcome = run([(40.0, "slow", "reward", 0, False, 150.0)])
    assert outcome.ends == ["finished"] and len(said(outcome, "recovered in")) == 1


@pytest.mark.parametrize("moment", moments(12))
def test_the_budget_is_spent_with_the_state_saved_where_that_is_possible(run: Run, moment: float) -> None:
    """What the rollout rank held cannot be saved when it is gone: the run must end all the same."""
    outcome = run([(moment, "kill", "rollout", 0, True)], rollout="broadcast", staleness=1, restarts=0, every=5)
    assert outcome.ends in (["spent", "finished"], ["finished"])
    for text in said(outcome, "the state after step"):
        assert text.endswith("is saved") or "could not be saved, the last checkpoint stands" in text


def test_a_death_during_the_last_save_is_recovered_from(run: Run) -> None:
    struck = 0
    for moment in moments(40):
        outcome = run([(moment, "stop"), (moment + 3.5, "kill", "value", 0)], asynchronous=False, every=0)
        assert set(outcome.ends) <= {"stopped", "finished"}
        struck += bool([text for text in outcome.said if "phase save" in text])
    assert struck > 3


def test_who_was_started_in_vain_is_started_again(run: Run) -> None:
    """The policy is new already when the value model dies while it loads: it must not be taken for the one that learnt."""
    for moment in moments(10):
        outcome = run([(moment, "kill", "policy", 0), (moment, "kill", "reward", 0)], {"reward": 1, "value": 1})
        assert outcome.ends == ["finished"]


def test_a_rollout_group_that_was_started_with_one_that_died_again_still_gets_its_weights(run: Run) -> None:
    for moment in moments(10):
        outcome = run([(moment, "kill", "rollout", 0), (moment, "kill", "reward", 0)], {"reward": 1}, rollout="broadcast")
        assert outcome.ends == ["finished"]


@pytest.mark.parametrize("transport", ["broadcast", "object_store"])
def test_a_rollout_rank_may_die_again_while_it_gets_its_weights(run: Run, transport: str) -> None:
    """What it owed is not forgotten, and the policy's half-way export is not taken up by the next one."""
    again = 0
    for moment in moments(20):
        for after in (4.5, 6.5, 8.0):
            outcome = run([(moment, "kill", "rollout", 0), (moment + after, "kill", "rollout", 0)], rollout=transport, ranks=1, staleness=1)
            assert outcome.ends == ["finished"]
            again += len(said(outcome, "recovering in")) > 1
    assert again > 10


def test_a_run_that_was_asked_to_end_goes_on_where_it_stood(run: Run) -> None:
    for staleness in (0, 2):
        for moment in moments(12)[:8]:
            outcome = run([(moment, "stop")], staleness=staleness, every=0)
            assert outcome.ends == ["stopped", "finished"] and len(said(outcome, "resumed after step")) == 1


@pytest.mark.parametrize(
    ("changes", "noticed"),
    [
        ([], True),
        (["run.resume: 'never', now 'auto'", "checkpoint.keep: 2, now 3", "placement.restarts: 3, now 4"], True),
        (["run.resume: 'never', now 'auto'", "policy.deepspeed: '', now 'zero3.json'"], False),
        (["rollout.ranks: 0, now 1"], False),
    ],
)
def test_another_base_model_is_noticed(schedules: Any, monkeypatch: pytest.MonkeyPatch, changes: list[str], noticed: bool) -> None:
    """What was saved is the trained part: with other weights under it the policy is another one."""
    fakes, run_state = schedules.fakes, lifecycle.RunState.from_dict
    world = schedules.world(0, [fakes.Fault(50.0, "coordinator")])
    monkeypatch.setattr(lifecycle, "changed_keys", lambda folder, config: changes)

    def other(values: dict[str, Any]) -> Any:
        return run_state(values | {"weights": values["weights"] + 1})

    monkeypatch.setattr(lifecycle.RunState, "from_dict", other)
    if not noticed:  # other settings, and so perhaps other bits
        schedules.run(fakes.Setting(), world)
        return
    with pytest.raises(AssertionError, match="ended otherwise: the restored policy's weights have the checksum") as seen:
        schedules.run(fakes.Setting(), world)
    assert isinstance(seen.value.__context__, UserError) and "base model" in seen.value.__context__.fix
