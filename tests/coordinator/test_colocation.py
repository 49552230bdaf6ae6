"""Engines that take turns: who is on the device when, over fakes that keep count; and whole runs, which taking turns must not change."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.engine import StepInfo
from rlhf_dist.contracts.flops import FlopModel
from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.moments import Moments
from rlhf_dist.contracts.reward import RewardResult
from rlhf_dist.contracts.roles import (
    ExperienceInfo,
    Needs,
    PieceInfo,
    RatioInfo,
    RestInfo,
    RestingRole,
    RolloutInfo,
    ScoreInfo,
    UpdateInfo,
    WrittenInfo,
)
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.contracts.weights import BucketInfo, Place, SyncInfo
from rlhf_dist.coordinator.colocation import Turns
from rlhf_dist.coordinator.ppo import PPOCoordinator
from rlhf_dist.coordinator.shards import Groups
from rlhf_dist.engines.deepspeed import DeepSpeedEngine
from rlhf_dist.rollout.native import NativeEngine
from rlhf_dist.runs.metrics import read_metrics
from rlhf_dist.runs.progress import NullReporter
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.runs.rollout_log import read_rollouts

Values = dict[str, Any]
TIMED = ("perf/", "time", "coordinator/", "weight_sync/seconds", "offload/")
WEIGHTS, TRAINING = 100, 300
GAPS = ("ratio/mean", "ratio/max", "sampler/mean", "sampler/max", "reference/mean", "reference/max")
FIRST = ("val/ratio_mean_deviation", "val/ratio_max_deviation", "policy/clipfrac_avg", "policy/approxkl_avg")


# --- the schedule, over fakes


class Device:
    """What is on it now: role → "weights" or "training".

    history: the whole of it after each call that uses an engine. left: who left in which phase.
    """

    def __init__(self) -> None:
        self.on: dict[str, str] = {}
        self.history: list[tuple[str, dict[str, str]]] = []
        self.phase = ""
        self.left: list[tuple[str, str]] = []


class Phases(NullReporter):
    """Tells the device of each phase."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def phase(self, step: int, name: str) -> None:
        self._device.phase = name


class Fake:
    """Every role at once: calls bring back what they need, `rest` takes it away. Two samples, of one token each, by each rank."""

    def __init__(self, role: str, device: Device) -> None:
        self.role, self.device = role, device
        device.on[role] = "training" if role in ("policy", "value") else "weights"

    def rest(self, needs: Needs) -> RestInfo:
        if needs == "nothing":
            self.device.left.append((self.role, self.device.phase))
            self.device.on.pop(self.role, None)
        elif needs != "training" and self.role in self.device.on:
            self.device.on[self.role] = "weights"
        state = self.device.on.get(self.role)
        trained = self.role in ("policy", "value")
        return RestInfo(TRAINING * (trained and state != "training"), WEIGHTS * (state is None), seconds=len(self.device.history) / 10)

    @contextmanager
    def used(self, what: str, state: str = "weights") -> Iterator[None]:
        if self.device.on.get(self.role) != "training":
            self.device.on[self.role] = state
        self.device.history.append((f"{self.role}.{what}", dict(self.device.on)))
        yield

    def describe(self) -> Values:
        return {"held_out_prompts": 2}

    def costs(self) -> FlopModel:
        return FlopModel(1.0, 0.0)

    def sync_weights(self, version: int) -> SyncInfo:
        with self.used("sync"):
            return SyncInfo(7)

    def place(self) -> Place:
        return Place("", "cpu", "127.0.0.1")

    def next_weights(self, bucket_bytes: int) -> Stored[Values, BucketInfo]:
        with self.used("sync"):
            return Stored({}, BucketInfo(0, SyncInfo(7)))

    def hold_weights(self, version: int, sent: SyncInfo) -> SyncInfo:
        with self.used("sync"):
            return sent

    def generate(self, request: Any) -> Stored[Any, RolloutInfo]:
        with self.used("generate"):
            ids = tuple(range(request.start, request.start + request.count))
            ones = (1,) * len(ids)
            return Stored(ids, RolloutInfo(ids, (0,) * len(ids), ones, ones, (0,) * len(ids), (request.version,) * len(ids), 0.1))

    def score(self, shard: Any) -> Stored[Any, PieceInfo]:
        with self.used("score"):
            return Stored(None, PieceInfo((), 0.0))

    def quarantine_to(self, path: str) -> None:
        pass

    def judge(self, shard: Any, stream: str, step: int) -> ScoreInfo:
        with self.used("judge"):
            return ScoreInfo(tuple(range(len(shard))), (RewardResult("even", (0.5,) * len(shard)),), 0.0)

    def ratio_check(self, shard: Any, pieces: Any) -> RatioInfo:
        with self.used("ratio_check"):
            return RatioInfo(zeros(*GAPS))

    def estimate(self, request: Any, shard: Any, pieces: Any) -> Stored[Any, ExperienceInfo]:
        ones, moments = (1,) * len(shard), Moments(len(shard), 0.0, 1.0)
        return Stored(None, ExperienceInfo(ones, ones, ones, (0.0,) * len(shard), moments, moments, zeros("objective/rlhf_reward")))

    def load_experience(self, shards: Any, advantages: Any) -> int:
        return 8

    def update(self, request: Any) -> UpdateInfo:
        with self.used("update", "training"):
            return UpdateInfo(zeros(*FIRST) if self.role == "policy" else Tally(), StepInfo(1.0, 1e-3), 0.0)

    def export(self, folder: str) -> None:
        with self.used("export"):
            pass

    def write_rollouts(self, path: str, shards: Any, pieces: Any, details: Any) -> WrittenInfo:
        return WrittenInfo(2, (0.0, 0.0))


def zeros(*names: str) -> Tally:
    return Tally(dict.fromkeys(names, 0.0), dict.fromkeys(names, 1.0))


@pytest.fixture
def fake_run(local_group: Any, ppo_values: Values, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Device]:
    """`fake_run(offload, section={…})`: two steps with evaluations and checkpoints, over one rank a role."""
    monkeypatch.setattr("rlhf_dist.coordinator.ppo.check_first_minibatch", lambda *args, **options: None)

    def run(offload: str, **changes: Values) -> Device:
        values = ppo_values | {"placement": {"launcher": "ray", "offload": offload}, "checkpoint": {"every": 1}}
        values |= {section: values.get(section, {}) | given for section, given in changes.items()}
        config, device = PPOConfig.model_validate(values), Device()
        roles = ("policy", "reward", "reference", "value", *(["rollout"] if config.rollout.ranks else []))
        groups = {role: local_group(role, [Fake(role, device)]) for role in roles}
        PPOCoordinator(config, Groups(**groups), Recorder(None), Phases(device)).run()
        return device

    return run


GROUP = {"rollout": {"ranks": 1, "weight_sync": "object_store"}}


@pytest.mark.parametrize("changes", [{}, GROUP, {"algorithm": {"old_logprobs": "sampler"}}, {"algorithm": {"target_kl_step": 0.1}}])
def test_one_engine_at_a_time_is_on_the_device(fake_run: Callable[..., Device], changes: Values) -> None:
    """In a sync with a rollout group both have their weights."""
    for call, on in fake_run("idle", **changes).history:
        role, what = call.split(".")
        beside = {"policy", "rollout"} if what == "sync" else set()
        assert on[role] == ("training" if what == "update" else "weights") and set(on) <= {role} | beside, call
        assert role == "policy" or what != "sync" or set(on) == beside


def test_sampling_ends_in_its_own_phase(fake_run: Callable[..., Device]) -> None:
    """Whoever scores first would wait for it, and the clock would call that scoring."""
    left = fake_run("idle", checkpoint={"every": 0}).left
    assert [role for role, phase in left if phase == "generate"] == ["policy"] * 2


def test_the_policy_takes_all_its_minibatches_before_the_value_model(fake_run: Callable[..., Device]) -> None:
    updates = [call for call, _ in fake_run("idle").history if call.endswith("update")]
    assert updates == 2 * (["policy.update"] * 4 + ["value.update"] * 4)


def test_without_offload_nobody_is_told_to_rest(fake_run: Callable[..., Device]) -> None:
    device = fake_run("none")
    assert all(len(on) == 4 and on["policy"] == on["value"] == "training" for _, on in device.history)
    updates = [call for call, _ in device.history if call.endswith("update")]
    assert updates == ["policy.update", "value.update"] * 8


def test_both_ways_ask_for_the_same_work(fake_run: Callable[..., Device]) -> None:
    assert sorted(call for call, _ in fake_run("idle").history) == sorted(call for call, _ in fake_run("none").history)


# --- turns


def test_what_is_away_is_counted_without_what_a_turn_brings_back(local_group: Any) -> None:
    device = Device()
    policy, value, reward = (local_group(role, [Fake(role, device)] * 2) for role in ("policy", "value", "reward"))
    turn = Turns([policy, value, reward])
    turn(policy, needs="sampler")
    assert device.on == {"policy": "weights"}
    assert turn.metrics() == {"offload/bytes": 2.0 * (TRAINING + TRAINING + WEIGHTS + WEIGHTS), "offload/seconds": 0.0}
    turn(policy, needs="training")
    device.on["policy"] = "training"
    device.history += [("", {})] * 5
    turn(value, needs="training")
    found = turn.metrics()
    assert found["offload/bytes"] == 2.0 * (TRAINING + TRAINING + WEIGHTS + WEIGHTS), "the most at one time since the last look"
    assert found["offload/seconds"] == pytest.approx(0.5), "of the ranks that rested; side by side, they count once"
    assert turn.metrics() == {"offload/bytes": 2.0 * (TRAINING + WEIGHTS + WEIGHTS), "offload/seconds": 0.0}


def test_who_stays_and_who_is_away_already_is_not_asked(local_group: Any) -> None:
    device, calls = Device(), list[Any]()
    policy, value = (local_group(role, [Fake(role, device)], calls) for role in ("policy", "value"))
    turn = Turns([policy, value])
    for _ in range(2):
        turn(policy)
    turn(policy, needs="training")
    turn()
    turn()
    assert [(name, given) for name, _, given in calls] == [
        ("policy.rest", ("weights",)), ("value.rest", ("nothing",)), ("policy.rest", ("training",)), ("policy.rest", ("nothing",)),
    ]  # fmt: skip
    assert hasattr(RestingRole, "rest")


def test_what_cannot_leave_is_named(local_group: Any) -> None:
    class Stuck:
        def rest(self, needs: Needs) -> RestInfo:
            return RestInfo(stays="it is stuck")

    turn = Turns([local_group("rollout", [Stuck(), Stuck()])])
    turn()
    assert turn.stays == ["it is stuck"]


def test_without_groups_a_turn_means_nothing(local_group: Any) -> None:
    group, turn = local_group("policy", [None]), Turns()
    turn(group, needs="training")
    assert (group.calls, turn.metrics(), turn.stays, turn.taken) == ([], {}, [], False)


# --- whole runs in one process


@pytest.fixture
def run(rlhf_dist_ppo: Callable[..., Path], tiny_run: Callable[[Path], Values], tmp_path: Path) -> Callable[..., Path]:
    """`run("idle", section={…})`: a tiny run with that offload, which is its name too."""

    def make(offload: str, **changes: Values) -> Path:
        values = tiny_run(tmp_path)
        for section, given in changes.items():
            values[section] = values.get(section, {}) | given
        values["run"]["name"], values["placement"]["offload"] = offload, offload
        return rlhf_dist_ppo(values)

    return make


def assert_same_run(one: Path, other: Path, roles: tuple[str, ...] = ("policy", "value")) -> None:
    """Metrics, but for times; samples; final weights: bit for bit."""
    lines = [read_metrics(root / "metrics.jsonl") for root in (one, other)]
    assert len(lines[0]) == len(lines[1])
    for first, second in zip(*lines, strict=True):
        names = [{name for name in line if not name.startswith(TIMED)} for line in (first, second)]
        assert names[0] == names[1] and {name for name in names[0] if first[name] != second[name]} == set()
        assert {name for name in second if name.startswith("offload/")} == {"offload/bytes", "offload/seconds"}
        assert second["offload/bytes"] > 0 and second["offload/seconds"] > 0 and "offload/bytes" not in first
    assert list((one / "rollouts").iterdir())
    for path in (one / "rollouts").iterdir():
        assert read_rollouts(path).equals(read_rollouts(other / "rollouts" / path.name))
    for role in roles:
        weights = [load_file(root / "export" / role / "model.safetensors") for root in (one, other)]
        assert weights[0].keys() == weights[1].keys() and all(weights[0][name].equal(weights[1][name]) for name in weights[0])


class Watch:
    """Looks, whenever a model is at work, at what all engines of this process have in memory."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.engines: list[DeepSpeedEngine] = []
        self.seen: Counter[str] = Counter()
        self._around(DeepSpeedEngine, "__init__", lambda engine: self.engines.append(engine))
        self._around(DeepSpeedEngine, "forward", lambda engine: self._alone(engine, "forward"))
        self._around(DeepSpeedEngine, "optimizer_step", lambda engine: self._alone(engine, "step"))
        self._around(NativeEngine, "generate", lambda sampler: self._alone(self._owner(sampler), "generate"))

    def _around(self, kind: type, name: str, look: Callable[[Any], None]) -> None:
        original = getattr(kind, name)

        def call(this: Any, *args: Any, **options: Any) -> Any:
            answer = original(this, *args, **options)
            look(this)
            return answer

        self._patch.setattr(kind, name, call)

    def _owner(self, sampler: Any) -> DeepSpeedEngine:
        return next(engine for engine in self.engines if engine.module.model is sampler._model)

    def _alone(self, worker: DeepSpeedEngine, what: str) -> None:
        self.seen[what] += 1
        for engine in self.engines:
            away, trained = engine.resting, engine._training is not None and engine._steps_taken > 0
            assert (away.weights > 0) == (engine is not worker), f"weights while {what}"
            if trained:
                assert (away.training > 0) == (engine is not worker or what != "step"), f"training state while {what}"


def test_a_run_whose_engines_take_turns_is_the_same_run(
    run: Callable[..., Path], tiny_scorer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five engines, two of them rewards, with evaluations and checkpoints; an update that may stop early."""
    changes: Values = {
        "reward": {"sources": [{"name": name, "kind": "model", "model": str(tiny_scorer)} for name in ("one", "other")]},
        "evaluation": {"every": 1},
        "checkpoint": {"every": 1},
        "rollout": {"shards_per_rank": 2},
        "policy": {"optim": {"lr": 3e-2}},
        "algorithm": {"target_kl_step": 0.05, "epochs": 3},
    }
    none = run("none", **changes)
    watch = Watch(monkeypatch)
    assert_same_run(none, run("idle", **changes))
    assert len(watch.engines) == 5 and min(watch.seen[what] for what in ("forward", "step", "generate")) > 3
    assert any(line.get("policy/stopped_early") for line in read_metrics(none / "metrics.jsonl")), "the value model stops along"


@pytest.mark.parametrize(("stage", "quantize"), [(0, "none"), (0, "nf4"), (3, "none")])
def test_so_it_is_with_an_adapter(run: Callable[..., Path], stage: int, quantize: str, wide_model: Path, tmp_path: Path) -> None:
    """The policy is its own reference; under ZeRO 3 a copy samples."""
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    adapted = {"model": str(wide_model), "lora": {"r": 2}, "quantize": quantize, "deepspeed": str(tmp_path / "zero.json")}
    changes: Values = {"policy": adapted, "algorithm": {"estimator": "reinforce"}}
    assert_same_run(*(run(offload, **changes) for offload in ("none", "idle")), roles=("policy",))
