"""The coordinator as it is, over ranks that a schedule delays, hangs and kills on a virtual clock: what it commits is what an undisturbed
run would have."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_dist.coordinator import lifecycle, ppo
from rlhf_dist.coordinator.pipeline import Pipeline
from rlhf_dist.coordinator.shards import Shard
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.saver import Saver
from rlhf_dist.runs.supervision import rebuild

SCHEDULES = 250
"""Of each of six settings."""
TELLING = (0, 1, 3, 29, 70)
"""Seeds that tell a wrong coordinator from the right one sooner than others."""
ROLES = st.sampled_from(["policy", "value", "reward", "reference", "rollout"])
FAULT_KINDS = st.sampled_from(["kill", "hang", "slow", "coordinator", "stop"])
FAULTS = st.tuples(st.floats(0, 150), FAULT_KINDS, ROLES, st.integers(0, 1), st.booleans(), st.floats(50, 250))


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Says which schedule it was."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        raise AssertionError(f"{what}: {error}") from error


@pytest.mark.parametrize("rollout", [False, True], ids=["policy samples", "rollout group"])
@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_any_schedule_ends_with_the_weights_of_an_undisturbed_run(schedules: Any, staleness: int, rollout: bool) -> None:
    totals: Counter[str] = Counter()
    for seed in range(SCHEDULES):
        setting = schedules.fakes.setting_of(seed, staleness, rollout=rollout)
        with named(f"seed {seed}, {setting}"):
            outcome = schedules.run(setting, schedules.drawn(seed, setting))
            schedules.check(setting, outcome)
        totals += outcome.counts + Counter(outcome.ends)
    assert min(totals[each] for each in (*schedules.fakes.KINDS, "bad starts", "repeated", "died", "spent", "stopped")) > 10, (
        "a schedule that shows little"
    )
    assert totals["rebuilt"] > SCHEDULES


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=st.lists(FAULTS, max_size=6), staleness=st.integers(0, 2), transport=st.sampled_from(["", "broadcast", "object_store"]))
def test_faults_of_any_kind_at_any_time(schedules: Any, faults: list[Any], staleness: int, transport: str) -> None:
    """The same, found and made small by hypothesis."""
    setting = schedules.fakes.Setting(staleness, transport)
    world = schedules.world(0, [schedules.fakes.Fault(*fault) for fault in faults])
    outcome = schedules.run(setting, world)
    schedules.check(setting, outcome)
    assert outcome.counts["coordinator"] == outcome.ends.count("died")


@pytest.mark.parametrize(("staleness", "rollout"), [(0, False), (2, True)])
def test_the_same_on_a_disk(schedules: Any, tmp_path: Path, staleness: int, rollout: bool) -> None:
    """With the run folder, its metrics and its checkpoints as they are."""
    for seed in range(4):
        setting = schedules.fakes.setting_of(seed, staleness, rollout=rollout)
        world = schedules.drawn(seed, setting)
        world.disk = schedules.fakes.FolderDisk()
        folder = RunFolder.create(tmp_path, f"run_{seed}").root
        with named(f"seed {seed}, {setting}"):
            schedules.check(setting, schedules.run(setting, world, folder))
        assert not list((folder / "checkpoints").glob(".*")), "what was half-written is gone"
        assert sorted(path.stem for path in (folder / "rollouts").iterdir()) == [
            f"step_{step:06d}" for step in range(1, schedules.fakes.STEPS + 1)
        ]


# --- the property is sharp: a coordinator that is wrong in one place is found out


def commits_what_is_not_written(patch: pytest.MonkeyPatch) -> None:
    def commit(self: Any, *, wait: bool) -> None:
        if self._on_its_way is not None:
            done, self._on_its_way = self._on_its_way, None
            self._recorder.commit_checkpoint(done.step, done.state, done.written, self._keep)

    patch.setattr(Saver, "_commit", commit)


def replays_without_rolling_the_value_model_back(patch: pytest.MonkeyPatch) -> None:
    bring_back = lifecycle.Lifecycle._roll_back

    def alone(self: Any, suspects: Any) -> str:
        value, self.groups.value.begin_rebuild = self.groups.value, lambda: None
        try:
            return bring_back(self, [group for group in suspects if group is not value])
        finally:
            del value.begin_rebuild

    load = Saver.load

    def without(self: Any, checkpoint: Any) -> None:
        groups, self._groups = self._groups, [group for group in self._groups if group.name == "policy" or not group.ranks[0].worker.ledger]
        load(self, checkpoint)
        self._groups = groups

    patch.setattr(lifecycle.Lifecycle, "_roll_back", alone)
    patch.setattr(Saver, "load", without)


def goes_on_with_a_model_that_was_started_anew(patch: pytest.MonkeyPatch) -> None:
    def rebuilt(self: Any, suspects: Any) -> str:
        rebuild(suspects)
        self._training = False
        return "rebuilt"

    patch.setattr(lifecycle.Lifecycle, "_roll_back", rebuilt)


def forgets_what_was_pending(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Pipeline, "kept", lambda self, step: {})


def samples_again_with_newer_weights(patch: pytest.MonkeyPatch) -> None:
    def generate(self: Any, step: int, version: int) -> list[Shard]:
        return asked(self, step, self.state.policy_version)

    asked = ppo.PPOCoordinator._generate
    patch.setattr(ppo.PPOCoordinator, "_generate", generate)
    patch.setattr(Pipeline, "kept", lambda self, step: {})
    patch.setattr(Pipeline, "staleness", lambda self, step, shards: Pipeline(99, 99).staleness(0, []))


def keeps_stale_answers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lifecycle, "forget_lost", lambda groups, shards: 0)
    patch.setattr(lifecycle, "lost_rollouts", lambda sampler, pipeline: [])


def counts_rewards_twice(patch: pytest.MonkeyPatch) -> None:
    load = lifecycle.RewardMixer.load_state_dict

    def once(self: Any, state: Any) -> None:
        if not any(moments["count"] for moments in self.state_dict().values()):
            load(self, state)

    patch.setattr(lifecycle.RewardMixer, "load_state_dict", once)


def does_not_go_back_in_the_metrics(patch: pytest.MonkeyPatch, fakes: SimpleNamespace) -> None:
    patch.setattr(fakes.MemoryRecorder, "rewind", lambda self, step, position: None)


@pytest.mark.parametrize(
    "wrong",
    [
        commits_what_is_not_written, replays_without_rolling_the_value_model_back, goes_on_with_a_model_that_was_started_anew,
        forgets_what_was_pending, samples_again_with_newer_weights, keeps_stale_answers, counts_rewards_twice,
        does_not_go_back_in_the_metrics,
    ],
    ids=lambda wrong: wrong.__name__,
)  # fmt: skip
def test_a_wrong_coordinator_is_found_out(schedules: Any, wrong: Callable[..., None], fakes: SimpleNamespace) -> None:
    schedules.clean(1), schedules.clean(1, 2)
    with pytest.MonkeyPatch.context() as patch:
        wrong(*(patch, fakes)[: wrong.__code__.co_argcount])
        found = any(_fault_found(schedules, seed) for seed in (*TELLING, *range(100)))
    assert found, "a hundred schedules do not tell it from the right one"


def _fault_found(schedules: Any, seed: int) -> str:
    setting = schedules.fakes.setting_of(seed, 1, rollout=seed % 2 == 0)
    try:
        schedules.check(setting, schedules.run(setting, schedules.drawn(seed, setting)))
    except (Exception, pytest.fail.Exception) as error:
        return f"{type(error).__name__}: {error}"
    return ""
