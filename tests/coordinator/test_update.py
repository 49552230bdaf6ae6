from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest

from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.engine import StepInfo
from rlhf_dist.contracts.flops import FlopModel
from rlhf_dist.contracts.moments import Moments
from rlhf_dist.contracts.roles import UpdateInfo, UpdateRequest
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.coordinator.experience import Experience
from rlhf_dist.coordinator.shards import Groups
from rlhf_dist.coordinator.update import Updater
from rlhf_dist.data.schedule import minibatch_rows

LENGTHS = (5, 9, 3, 7, 4, 8, 6, 2)
VALID = (2, 3, 1, 2, 2, 3, 2, 1)


class Trained:
    """Counts its optimizer steps; its k2 to the old policy grows by 0.1 with every step."""

    def __init__(self, name: str, skipped: Sequence[int] = ()) -> None:
        self.name, self.skipped = name, skipped
        self.loaded: list[Any] = []
        self.requests: list[UpdateRequest] = []

    def costs(self) -> FlopModel:
        """The value model's attention is dear."""
        return FlopModel(2.0, 0.0) if self.name == "policy" else FlopModel(2.0, 2.0)

    def load_experience(self, shards: Sequence[Any], advantages: Moments) -> int:
        self.loaded.append((tuple(shards), advantages))
        return len(LENGTHS)

    def update(self, request: UpdateRequest) -> UpdateInfo:
        number = len(self.requests)
        self.requests.append(request)
        tally = Tally()
        rows = sum(len(microbatch) for microbatch in request.microbatches)
        if self.name == "policy":
            tally.add("policy/approxkl_avg", 0.1 * number * rows, rows)
        skips = number in self.skipped
        return UpdateInfo(tally, StepInfo(float("inf") if skips else float(number), lr=1.0 / (1 + number), skipped=skips), 0.0)


def updater(
    local_group: Any, ppo_values: dict[str, Any], ranks: int = 1, skipped: Sequence[int] = (), **algorithm: Any
) -> tuple[Updater, Groups, list[Any]]:
    calls: list[Any] = []
    config = PPOConfig.model_validate(ppo_values | {"algorithm": {"epochs": 3, "minibatches": 2} | algorithm})
    policy = local_group("policy", [Trained("policy", skipped) for _ in range(ranks)], calls)
    value = local_group("value", [Trained("value") for _ in range(ranks)], calls) if config.needs_value else None
    groups = Groups(policy, local_group("reward", [None]), None, value)
    return Updater(config, groups), groups, calls


def experience() -> Experience:
    return Experience(("handle",), LENGTHS, VALID, (0.0,) * 8, Moments(16, 0.0, 1.0), Tally())  # type: ignore[arg-type]


def rows_of(requests: Sequence[UpdateRequest]) -> list[int]:
    return sorted(row for request in requests for microbatch in request.microbatches for row in microbatch)


def test_policy_and_value_take_the_scheduled_minibatches_side_by_side(local_group: Any, ppo_values: dict[str, Any]) -> None:
    update, groups, calls = updater(local_group, ppo_values, ranks=2)
    report = update.update(4, experience())
    update.update(5, experience())
    asked = [name for name, rank, _ in calls if rank == 0]
    once = ["policy.costs", "value.costs"]
    assert [name for name in asked if name in once] == once
    assert [name for name in asked if name not in once] == 2 * (
        ["policy.load_experience", "value.load_experience"] + ["policy.update", "value.update"] * 6
    )
    plan = [rows for step in (4, 5) for epoch in minibatch_rows(8, 3, 2, seed=3, step=step) for rows in epoch]
    for group in (groups.policy, groups.value):
        requests = [worker.requests for worker in group.workers]  # type: ignore[union-attr, attr-defined]
        for number, rows in enumerate(plan):
            assert rows_of([rank[number] for rank in requests]) == sorted(rows)
            assert {rank[number].denominator for rank in requests} == {float(sum(VALID[row] for row in rows))}  # global, not the rank's
            assert len({len(rank[number].microbatches) for rank in requests}) == 1
    assert (report.policy_steps, report.stopped_early) == (6, False)


def test_everyone_trains_on_the_same_experience(local_group: Any, ppo_values: dict[str, Any]) -> None:
    update, groups, _ = updater(local_group, ppo_values, ranks=2)
    update.update(0, experience())
    for worker in (*groups.policy.workers, *groups.value.workers):  # type: ignore[union-attr, attr-defined]
        assert worker.loaded == [(("handle",), Moments(16, 0.0, 1.0))]


@pytest.mark.parametrize(("reduction", "expected"), [("token_mean", 16.0), ("sequence_mean", 8.0), ("fixed", 96.0)])
def test_the_denominator_is_global_and_of_the_reduction(
    local_group: Any, ppo_values: dict[str, Any], reduction: str, expected: float
) -> None:
    update, groups, _ = updater(local_group, ppo_values, ranks=2, minibatches=1, epochs=1, reduction=reduction)
    update.update(0, experience())
    assert [worker.requests[0].denominator for worker in groups.policy.workers] == [expected] * 2  # type: ignore[attr-defined]


def test_the_update_ends_when_the_policy_has_gone_too_far(local_group: Any, ppo_values: dict[str, Any]) -> None:
    """k2 is 0, 0.1, 0.2, 0.3, ...; 1.5 times the target is 0.225."""
    update, groups, _ = updater(local_group, ppo_values, target_kl_step=0.15)
    report = update.update(0, experience())
    assert report.stopped_early and report.metrics["policy/stopped_early"] == 1.0
    assert report.policy_steps == 4
    assert len(groups.value.workers[0].requests) == 4  # type: ignore[union-attr, attr-defined]
    assert report.metrics["policy/approxkl_avg"] == pytest.approx(0.15)


def test_without_a_target_nothing_stops_it(local_group: Any, ppo_values: dict[str, Any]) -> None:
    update, _, _ = updater(local_group, ppo_values)
    assert update.update(0, experience()).metrics["policy/stopped_early"] == 0.0


def test_the_value_model_trains_alone_while_it_warms_up(local_group: Any, ppo_values: dict[str, Any]) -> None:
    update, groups, _ = updater(local_group, ppo_values | {"value": {"warmup_steps": 2}}, target_kl_step=0.01)
    for step in (0, 1):
        report = update.update(step, experience())
        assert (report.policy_steps, report.first, report.stopped_early) == (0, {}, False)
        assert "lr/policy" not in report.metrics and "lr/value" in report.metrics
    assert groups.policy.workers[0].loaded == []  # type: ignore[attr-defined]
    assert update.update(2, experience()).policy_steps > 0


def test_an_estimator_without_value_model_has_no_value_warm_up(local_group: Any, ppo_values: dict[str, Any]) -> None:
    update, _, calls = updater(local_group, ppo_values | {"value": {"warmup_steps": 2}}, estimator="rloo")
    assert update.update(0, experience()).policy_steps == 6
    assert not any(name.startswith("value") for name, _, _ in calls)


def test_law_3_is_shown_the_first_minibatch_alone(local_group: Any, ppo_values: dict[str, Any]) -> None:
    update, _, _ = updater(local_group, ppo_values)
    report = update.update(0, experience())
    assert report.first == {"policy/approxkl_avg": 0.0}
    assert report.metrics["policy/approxkl_avg"] == pytest.approx(0.25)  # of all six


def test_steps_that_overflow_skipped_have_no_gradient_norm(local_group: Any, ppo_values: dict[str, Any]) -> None:
    """fp16 begins with a loss scale that overflows: an infinite norm in the metrics would end the run."""
    update, _, _ = updater(local_group, ppo_values, skipped=(0, 3))
    report = update.update(0, experience())
    assert report.policy_steps == 4
    assert report.metrics["policy/skipped_steps"] == pytest.approx(2 / 6)
    assert report.metrics["policy/grad_norm"] == (1 + 2 + 4 + 5) / 4 and report.metrics["policy/grad_norm_max"] == 5
    assert report.metrics["lr/policy"] == 1 / 6


def test_fewer_rows_than_minibatches_after_drops(local_group: Any, ppo_values: dict[str, Any]) -> None:
    update, groups, _ = updater(local_group, ppo_values, minibatches=4, epochs=1)
    left = Experience(("handle",), LENGTHS[:3], VALID[:3], (0.0,) * 3, Moments(6, 0.0, 1.0), Tally())  # type: ignore[arg-type]
    assert update.update(0, left).policy_steps == 3
    assert rows_of(groups.policy.workers[0].requests) == [0, 1, 2]  # type: ignore[attr-defined]


@pytest.mark.parametrize("packed", ["policy", "value"])
def test_a_budget_counts_no_padding_where_rows_are_packed(packed: str, local_group: Any, ppo_values: dict[str, Any]) -> None:
    """Eight rows of 44 tokens, 72 when padded."""
    values = ppo_values | {name: ppo_values[name] | {"packing": name == packed, "microbatch_tokens": 44} for name in ("policy", "value")}
    update, groups, _ = updater(local_group, values, epochs=1, minibatches=1)
    update.update(0, experience())
    counts = {group.name: [len(request.microbatches) for request in group.workers[0].requests] for group in groups.trained()}  # type: ignore[attr-defined]
    assert counts == {name: [1 if name == packed else 2] for name in ("policy", "value")}


def test_each_models_ranks_get_like_work_by_its_own_costs(local_group: Any, ppo_values: dict[str, Any]) -> None:
    """The policy's in tokens; the value model's attention costs s² beside s."""
    lengths = (12, 8, 5, 3, 9, 2, 8, 8)
    update, groups, _ = updater(local_group, ppo_values, ranks=2, epochs=1, minibatches=1)
    update.update(0, dataclasses.replace(experience(), lengths=lengths))
    work = {}
    for group in groups.trained():
        shares = [[lengths[row] for row in rows_of(worker.requests)] for worker in group.workers]  # type: ignore[attr-defined]
        work[group.name] = sorted(sum(s + (s * s if group.name == "value" else 0) for s in share) for share in shares)
    assert work == {"policy": [27, 28], "value": [252, 258]}  # shared out by tokens, the value model's would be 210 and 300


def test_what_a_skipped_step_counted_is_left_out_and_its_fault_reported(
    local_group: Any, ppo_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1 and 4 of six: a loss, a gradient. Where each would be written, and how many may be, goes with the request."""
    update, groups, _ = updater(local_group, ppo_values, ranks=2, target_kl_step=100.0)
    ask = Trained.update

    def faulty(self: Trained, request: UpdateRequest) -> UpdateInfo:
        number, info = len(self.requests), ask(self, request)
        if self.name == "value" or number not in (0, 3):
            return info
        tally = Tally()
        tally.add("policy/approxkl_avg", math.nan, 1)
        fault = "loss" if number == 0 else "gradient"
        return UpdateInfo(tally, StepInfo(math.nan, 0.1, skipped=True), 0.0, fault, request.capsule)  # type: ignore[arg-type]

    monkeypatch.setattr(Trained, "update", faulty)
    update._capsule_path = lambda step, name, number: f"{step}/{name}/{number}"
    report = update.update(4, experience(), {"policy": 2})
    assert report.faults == {"policy": ["loss", "", "", "gradient", "", ""], "value": [""] * 6}
    assert report.capsules == [("policy", "5/policy/1"), ("policy", "5/policy/4")]
    assert report.first == {} and report.policy_steps == 4 and not report.stopped_early and report.unsound == ""
    assert report.metrics["policy/approxkl_avg"] == pytest.approx(0.1 * (1 + 2 + 4 + 5) / 4)
    assert report.metrics["policy/skipped_steps"] == 2 / 6 and math.isfinite(report.metrics["policy/grad_norm_max"])
    asked = {group.name: [(r.capsule, r.capsules) for r in group.workers[0].requests] for group in groups.trained()}  # type: ignore[attr-defined]
    assert asked["policy"] == [(f"5/policy/{n}", 2) for n in range(1, 7)] and asked["value"][0] == ("5/value/1", 0)


def test_steps_that_the_loss_scale_skips_are_no_fault(local_group: Any, ppo_values: dict[str, Any]) -> None:
    report = updater(local_group, ppo_values, skipped=(0, 3))[0].update(0, experience())
    assert report.faults["policy"] == [""] * 4 and report.policy_steps == 4 and report.first == {"policy/approxkl_avg": 0.0}


def test_a_weight_that_is_not_finite_on_any_rank_is_named(
    local_group: Any, ppo_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    update, groups, _ = updater(local_group, ppo_values, ranks=2)
    ask, second = Trained.update, groups.trained()[1].workers[1]  # type: ignore[attr-defined]
    monkeypatch.setattr(Trained, "update", lambda self, r: dataclasses.replace(ask(self, r), unsound="head" if self is second else ""))
    assert update.update(0, experience()).unsound == "head of the value"
