"""Who samples changes nothing: a run with a rollout group is that of a policy that samples itself, bit for bit, by every transport."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.group import Stored
from rlhf_dist.coordinator.ppo import PPOCoordinator
from rlhf_dist.coordinator.shards import Groups
from rlhf_dist.engines.process import Rank
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.metrics import read_metrics
from rlhf_dist.runs.progress import NullReporter
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.runs.rollout_log import read_rollouts
from rlhf_dist.workers.roles import build_worker

STEPS = 2
PLACES = ("perf/", "weight_sync/seconds", "weight_sync/bytes", "weight_sync/buckets", "coordinator/", "time")
"""Metrics that tell where the work was done, and nothing of the result."""


@dataclass(frozen=True)
class ThreadHandle:
    """contracts.group.Handle over an answer of another thread."""

    answer: Future[Any]

    def info(self) -> Any:
        answer = self.answer.result(timeout=60)
        return answer.info if isinstance(answer, Stored) else answer


class ThreadGroup:
    """contracts.group.WorkerGroup whose ranks work side by side, each through its calls in order, as actors do."""

    def __init__(self, name: str, workers: Sequence[Any], threads: Sequence[ThreadPoolExecutor]) -> None:
        self.name, self.world_size = name, len(workers)
        self._ranks = list(zip(workers, threads, strict=True))

    def submit(self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...] | None]) -> list[ThreadHandle]:
        return [
            ThreadHandle(thread.submit(lambda call, given: call(*delivered(given)), getattr(worker, method.__name__), given))
            for (worker, thread), given in zip(self._ranks, arguments, strict=True)
            if given is not None
        ]

    def collect(self, handles: Sequence[ThreadHandle]) -> list[Any]:
        return [handle.info() for handle in handles]


def delivered(value: Any) -> Any:
    if isinstance(value, ThreadHandle):
        return value.answer.result(timeout=60).payload
    return type(value)(delivered(item) for item in value) if type(value) in (tuple, list) else value


@pytest.fixture
def run(plain_rank: Rank, tiny_run: Callable[[Path], dict[str, Any]], tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`run("name", rollout={…}, policy={…})`: a short run whose engines share a thread and whose rollout ranks have one each."""
    threads = [ThreadPoolExecutor(1) for _ in range(3)]

    def make(name: str, **sections: dict[str, Any]) -> Path:
        values = tiny_run(tmp_path)
        values["run"] |= {"name": name, "steps": STEPS}
        values["placement"] = {"launcher": "ray"}
        values["algorithm"] |= {"estimator": "reinforce"}
        for section, changes in sections.items():
            values[section] |= changes
        config = PPOConfig.model_validate(values)
        roles = ["policy", "reward", *(["reference"] if config.needs_reference else [])]
        groups = {role: ThreadGroup(role, [build_worker(role, config, plain_rank)], threads[:1]) for role in roles}
        if ranks := config.rollout.ranks:
            alone = [build_worker("rollout", config, Rank(rank, ranks, 0, "cpu")) for rank in range(ranks)]
            groups["rollout"] = ThreadGroup("rollout", alone, threads[1 : 1 + ranks])
        folder = RunFolder.create(config.run.output_dir, config.run.name, False)
        PPOCoordinator(config, Groups(**groups), Recorder(folder), NullReporter()).run()  # type: ignore[arg-type]
        return folder.root

    yield make
    for thread in threads:
        thread.shutdown(wait=False)


def results(root: Path) -> list[dict[str, Any]]:
    """What a run says of itself; preflight looks at single rows, cut as the sampler's ranks are."""
    hidden = (*PLACES, "preflight/")
    return [{name: v for name, v in line.items() if not name.startswith(hidden)} for line in read_metrics(root / "metrics.jsonl")]


def assert_same_run(one: Path, other: Path) -> None:
    """Metrics, the checksum of every step's weights among them; samples; final weights."""
    first, second = results(one), results(other)
    assert [line.keys() for line in first] == [line.keys() for line in second]
    differing = {name for a, b in zip(first, second, strict=True) for name in a if a[name] != b[name]}
    assert not differing and len({line["weight_sync/checksum"] for line in results(one)[1:]}) == STEPS
    for step in range(1, STEPS + 1):
        samples = [read_rollouts(root / "rollouts" / f"step_{step:06d}.parquet") for root in (one, other)]
        assert samples[0].equals(samples[1])
    weights = [load_file(root / "export" / "policy" / "model.safetensors") for root in (one, other)]
    assert weights[0].keys() == weights[1].keys() and all(weights[0][name].equal(weights[1][name]) for name in weights[0])


@pytest.fixture
def one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads know no node, so the placement is told that there is one; small buckets, so that there are several."""
    monkeypatch.setattr("rlhf_dist.coordinator.sync.BUCKET_BYTES", 20_000)
    monkeypatch.setattr("rlhf_dist.workers.places.node_id", lambda: "here")


@pytest.mark.parametrize(
    ("transport", "ranks", "old"), [("ipc", 1, "recompute"), ("broadcast", 2, "sampler"), ("object_store", 2, "recompute")]
)
def test_rollout_ranks_sample_what_the_policy_would(run: Callable[..., Path], one_node: None, transport: str, ranks: int, old: str) -> None:
    """The policy's own shards are cut as the ranks' are."""
    algorithm = {"old_logprobs": old}
    own = run("own", rollout={"shards_per_rank": ranks}, algorithm=algorithm)
    group = run("group", rollout={"ranks": ranks, "weight_sync": transport}, algorithm=algorithm)
    assert_same_run(own, group)
    moved, kept = (read_metrics(root / "metrics.jsonl")[-1] for root in (group, own))
    assert moved["weight_sync/bytes"] > 50_000 and moved["weight_sync/buckets"] > 3
    assert (kept["weight_sync/bytes"], kept["weight_sync/buckets"]) == (0, 0)
    assert moved["weight_sync/seconds"] > 0 and kept["weight_sync/seconds"] > 0


def test_stale_samples_are_the_same_too(run: Callable[..., Path], one_node: None) -> None:
    """Weights are asked for while the rank still has older samples to draw: it takes them afterwards."""
    own, group = run("own", rollout={"max_staleness": 1}), run("group", rollout={"max_staleness": 1, "ranks": 1})
    assert_same_run(own, group)
    assert read_metrics(group / "metrics.jsonl")[-1]["rollout/staleness"] == 1


def test_adapters_are_pushed_merged_and_law_3_holds(run: Callable[..., Path], one_node: None) -> None:
    """The rollout rank holds a plain model; preflight and every first minibatch compare it with the policy and its adapter."""
    root = run("lora", rollout={"ranks": 1}, policy={"lora": {"r": 4}}, algorithm={"old_logprobs": "sampler"})
    assert len({line["weight_sync/checksum"] for line in results(root)[1:]}) == STEPS
