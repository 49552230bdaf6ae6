"""What runs beside what, by the clock: the real coordinator over real Ray actors, whose workers only wait, and write down when.

They wait without computing, so a loaded machine hardly changes who overlaps with whom.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from rlhf_dist.config.operation import PlacementSection
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.engine import StepInfo
from rlhf_dist.contracts.flops import FlopModel
from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.moments import Moments
from rlhf_dist.contracts.reward import RewardResult
from rlhf_dist.contracts.roles import (
    ExperienceInfo,
    GenerateRequest,
    PieceInfo,
    RatioInfo,
    RolloutInfo,
    ScoreInfo,
    UpdateInfo,
    UpdateRequest,
    WrittenInfo,
)
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.contracts.weights import BucketInfo, Place, SyncInfo
from rlhf_dist.coordinator.ppo import PPOCoordinator
from rlhf_dist.coordinator.shards import Groups
from rlhf_dist.runs.progress import BufferedReporter
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.workers.placement import Demand
from rlhf_dist.workers.ray_group import RayGroup

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROLES = ("policy", "reward", "reference", "value", "rollout")
STEPS, SHARDS, SAMPLING, UPDATE, SCORING = 3, 3, 0.5, 0.4, 0.02
GAPS = ("ratio/mean", "ratio/max", "sampler/mean", "sampler/max", "reference/mean", "reference/max")
FIRST = ("val/ratio_mean_deviation", "val/ratio_max_deviation", "policy/clipfrac_avg")


def zeros(*names: str) -> Tally:
    return Tally(dict.fromkeys(names, 0.0), dict.fromkeys(names, 1.0))


class Idler:
    """Every role at once. One sample a prompt, one token a sample; a shard's payload is its (step, first prompt)."""

    def __init__(self, role: str, log: Path, rank: Any) -> None:
        self.role, self.log, self.version, self.updates = role, log, -1, 0

    @contextmanager
    def noting(self, what: str, seconds: float, **about: Any) -> Iterator[None]:
        began = time.time()
        time.sleep(seconds)
        yield
        line = {"role": self.role, "what": what, "began": began, "ended": time.time()} | about
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def describe(self) -> dict[str, Any]:
        return {"held_out_prompts": 0}

    def costs(self) -> FlopModel:
        return FlopModel(1.0, 0.0)

    def place(self) -> Place:
        return Place("", "cpu", "127.0.0.1")

    def next_weights(self, bucket_bytes: int) -> Stored[dict[str, Any], BucketInfo]:
        return Stored({}, BucketInfo(0, SyncInfo(7)))

    def hold_weights(self, version: int, sent: SyncInfo) -> SyncInfo:
        with self.noting("hold", 0.0, version=version):
            self.version = version
        return sent

    def generate(self, request: GenerateRequest) -> Stored[Any, RolloutInfo]:
        probe = request.step >= STEPS
        with self.noting("generate", 0.0 if probe else SAMPLING, step=request.step, first=request.start, version=self.version):
            assert request.version == self.version
        one, zero = (1,) * request.count, (0,) * request.count
        ids = tuple(range(request.start, request.start + request.count))
        return Stored(
            (request.step, request.start, request.count), RolloutInfo(ids, zero, one, one, zero, (self.version,) * request.count, SAMPLING)
        )

    def score(self, shard: tuple[int, int, int]) -> Stored[Any, PieceInfo]:
        with self.noting("score", SCORING, step=shard[0], first=shard[1]):
            return Stored(None, PieceInfo((), SCORING))

    def quarantine_to(self, path: str) -> None:
        pass

    def judge(self, shard: tuple[int, int, int], stream: str, step: int) -> ScoreInfo:
        with self.noting("judge", SCORING, step=shard[0], first=shard[1]):
            return ScoreInfo(tuple(range(shard[2])), (RewardResult("r", (1.0,) * shard[2]),), SCORING)

    def ratio_check(self, shard: Any, pieces: Any) -> RatioInfo:
        return RatioInfo(zeros(*GAPS))

    def estimate(self, request: Any, shard: tuple[int, int, int], pieces: Any) -> Stored[Any, ExperienceInfo]:
        one = (1,) * shard[2]
        info = ExperienceInfo(one, one, one, (0.0,) * shard[2], Moments(shard[2], 0.0, 1.0), Moments(), zeros("objective/rlhf_reward"))
        return Stored(None, info)

    def load_experience(self, shards: Any, advantages: Moments) -> int:
        return len(shards)

    def update(self, request: UpdateRequest) -> UpdateInfo:
        with self.noting("update", UPDATE, step=self.updates):
            self.updates += 1
        return UpdateInfo(zeros(*FIRST), StepInfo(1.0, 0.1), UPDATE)

    def write_rollouts(self, path: str, shards: Any, pieces: Any, details: Any) -> WrittenInfo:
        return WrittenInfo()

    def export(self, folder: str) -> None:
        pass


@pytest.fixture(scope="module")
def timeline(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What all workers noted in a run of staleness 1, with three shards a step and one update."""
    log = tmp_path_factory.mktemp("overlap") / "log.jsonl"
    config = PPOConfig.model_validate(
        {
            "run": {"name": "overlap", "steps": STEPS},
            "data": {"train": "prompts.jsonl"},
            "policy": {"model": "none"},
            "reward": {"sources": [{"name": "r", "kind": "function", "path": "rewards.py:r"}]},
            "rollout": {"ranks": 1, "prompts_per_step": 6, "shards_per_rank": SHARDS, "max_staleness": 1, "weight_sync": "object_store"},
            "algorithm": {"epochs": 1, "minibatches": 1},
        }
    )
    groups: dict[str, Any] = {
        role: RayGroup(Demand(role, 1, 0.1, 0.0, "PACK", alone=True), functools.partial(Idler, role, log), PlacementSection())
        for role in ROLES
    }
    try:
        for each in groups.values():
            each.begin_start()
        for each in groups.values():
            each.finish_start()
        PPOCoordinator(config, Groups(**groups), Recorder(None), BufferedReporter()).run()
    finally:
        for each in groups.values():
            each.close()
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture
def noted(timeline: list[dict[str, Any]]) -> Callable[..., list[dict[str, Any]]]:
    """`noted(role=…, what=…, …)`: the lines in which all that holds, in order of their beginning."""

    def find(**wanted: Any) -> list[dict[str, Any]]:
        found = [line for line in timeline if line.items() >= wanted.items()]
        assert found, wanted
        return sorted(found, key=lambda line: line["began"])

    return find


def overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["began"] < other["ended"] and other["began"] < one["ended"])


@pytest.mark.parametrize(("role", "what"), [("reward", "judge"), ("reference", "score")])
def test_scoring_streams_behind_generation(noted: Callable[..., Any], role: str, what: str) -> None:
    for step in range(STEPS):
        sampled, scored = noted(role="rollout", what="generate", step=step), noted(role=role, what=what, step=step)
        assert len(sampled) == len(scored) == SHARDS
        assert scored[0]["first"] == sampled[0]["first"] and scored[0]["began"] >= sampled[0]["ended"]
        assert scored[0]["ended"] < sampled[-1]["ended"], "the first shard was scored while the last one was sampled"


def test_policy_and_value_train_side_by_side(noted: Callable[..., Any]) -> None:
    for step in range(STEPS):
        (policy,), (value,) = (noted(role=role, what="update", step=step) for role in ("policy", "value"))
        assert overlap(policy, value)


def test_the_next_step_is_sampled_while_this_one_trains(noted: Callable[..., Any]) -> None:
    for step in range(STEPS - 1):
        (update,) = noted(role="policy", what="update", step=step)
        assert any(overlap(shard, update) for shard in noted(role="rollout", what="generate", step=step + 1))


def test_weights_come_behind_the_samples_that_were_asked_for_before_them(noted: Callable[..., Any]) -> None:
    """Version t + 1 reaches the sampler after the samples of step t + 1, which are of version t, and before those of step t + 2."""
    assert [(line["step"], line["version"]) for line in noted(role="rollout", what="generate") if line["step"] < STEPS] == [
        (step, max(0, step - 1)) for step in range(STEPS) for _ in range(SHARDS)
    ]
    for version in range(1, STEPS):
        (held,) = noted(role="rollout", what="hold", version=version)
        assert noted(role="rollout", what="generate", step=version)[-1]["ended"] <= held["began"]


def test_what_learns_scores_at_the_version_that_trains(noted: Callable[..., Any]) -> None:
    """Values and old log-probs of step t are asked for once step t − 1 has trained, though the samples were there before."""
    for role in ("policy", "value"):
        for step in range(1, STEPS):
            (before,), (update,) = (noted(role=role, what="update", step=number) for number in (step - 1, step))
            scored = noted(role=role, what="score", step=step)
            assert before["ended"] <= scored[0]["began"] and scored[-1]["ended"] <= update["began"]
