from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.config.errors import UserError
from rlhf_dist.coordinator.pipeline import Pipeline
from rlhf_dist.coordinator.shards import Shard


def walked(steps: int, staleness: int) -> list[tuple[int, list[tuple[int, int]], int]]:
    """(step, what was asked for before it as (step, version), steps then pending) of a whole run."""
    pipeline, log = Pipeline(steps, staleness), []
    for step in range(steps):
        asked: list[tuple[int, int]] = []
        pipeline.ask(step, lambda *what, asked=asked: asked.append(what) or [])
        log.append((step, asked, len(pipeline.pending)))
        pipeline.done(step)
    assert not pipeline.pending, "nothing is sampled that no step trains on"
    return log


def test_the_schedule_as_the_docstring_draws_it() -> None:
    assert walked(4, 1) == [(0, [(0, 0), (1, 0)], 2), (1, [(2, 1)], 2), (2, [(3, 2)], 2), (3, [], 1)]


def test_without_staleness_each_step_asks_for_its_own() -> None:
    assert walked(3, 0) == [(step, [(step, step)], 1) for step in range(3)]


@given(steps=st.integers(1, 40), staleness=st.integers(0, 50))
def test_every_step_is_asked_once_in_order_and_of_the_version_the_policy_then_is(steps: int, staleness: int) -> None:
    log = walked(steps, staleness)
    asked = [what for _, new, _ in log for what in new]
    assert asked == [(step, max(0, step - staleness)) for step in range(steps)]
    for step, new, pending in log:
        assert all(version == step for _, version in new), "the sampler holds no other version than the current one"
        assert 1 <= pending <= staleness + 1


@given(steps=st.integers(1, 30), staleness=st.integers(0, 8), stop=st.integers(0, 30), begun=st.booleans())
def test_a_restored_run_asks_for_what_is_missing_of_the_version_it_then_has(steps: int, staleness: int, stop: int, begun: bool) -> None:
    """Also where the samples of newer weights were asked for already: those are sampled again, and nothing is twice."""
    stop = min(stop, steps - 1)
    pipeline = Pipeline(steps, staleness)
    for step in range(stop):
        pipeline.ask(step, lambda *_: [])
        pipeline.done(step)
    if begun:
        pipeline.ask(stop, lambda *_: [])
    kept = pipeline.kept(stop)
    assert all(pipeline.version(step) < stop for step in kept)
    again, asked = Pipeline(steps, staleness), list[tuple[int, int]]()
    again.restore(stop, kept)
    for step in range(stop, steps):
        new: list[tuple[int, int]] = []
        again.ask(step, lambda *what, new=new: new.append(what) or [])
        assert all(version == step for _, version in new), "the policy is of that version, and of no other"
        asked += new
        assert step in again.pending
        again.done(step)
    assert sorted([*kept, *(step for step, _ in asked)]) == list(range(stop, steps)) and not again.pending


def test_new_shards_come_in_the_order_in_which_they_are_sampled(sampled_shard: Callable[..., Shard]) -> None:
    made = {step: [sampled_shard([1]), sampled_shard([2])] for step in range(3)}
    pipeline = Pipeline(9, 2)
    assert pipeline.ask(0, lambda step, version: made[step]) == [shard for step in range(3) for shard in made[step]]
    pipeline.done(0)
    assert set(pipeline.pending) == {1, 2} and pipeline.shards() == [*made[1], *made[2]]


def of_versions(shard: Shard, *versions: int) -> Shard:
    shard.info = dataclasses.replace(shard.info, versions=versions)  # type: ignore[type-var]
    return shard


def test_staleness_is_counted_over_samples(sampled_shard: Callable[..., Shard]) -> None:
    shards = [of_versions(sampled_shard([1, 1]), 3, 3), of_versions(sampled_shard([1]), 3)]
    tally = Pipeline(9, 2).staleness(5, shards)
    assert tally.means() == {"rollout/staleness": 2.0, "rollout/staleness_max": 2.0} and tally.weights == {"rollout/staleness": 3.0}


@pytest.mark.parametrize("wrong", [2, 4, 5])
def test_samples_of_another_version_are_refused(sampled_shard: Callable[..., Any], wrong: int) -> None:
    """Older, newer, and even the current version: the schedule alone says which one it is."""
    shards = [of_versions(sampled_shard([1]), 3), of_versions(sampled_shard([1]), wrong)]
    with pytest.raises(UserError, match=rf"versions? .*{wrong}.* came for a step that trains on version 3") as error:
        Pipeline(9, 2).staleness(5, shards)
    assert error.value.where.startswith("step 6, rollouts (law 8")
