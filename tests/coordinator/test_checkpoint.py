from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.config.operation import CheckpointSection
from rlhf_dist.contracts.engine import SavedFile
from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.roles import RolloutInfo
from rlhf_dist.coordinator.checkpoint import Checkpointer, export
from rlhf_dist.coordinator.colocation import Turns
from rlhf_dist.coordinator.pipeline import Pipeline
from rlhf_dist.coordinator.shards import Groups, Shard, collect_rollouts
from rlhf_dist.runs.checkpoints import CheckpointStore
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.runs.state import RunState


class Model:
    """Writes at once what it holds; samples are text."""

    def __init__(self, rank: int, name: str = "") -> None:
        self.rank, self.holds = rank, f"{name} of rank {rank}"
        self.files: tuple[SavedFile, ...] = ()

    def export(self, folder: str) -> None:
        if self.rank == 0:
            write(Path(folder) / "model.safetensors", "weights")

    def begin_save(self, folder: str) -> None:
        self.files = (write(Path(folder) / f"rank_{self.rank}", self.holds),)

    def saved(self, wait: bool) -> tuple[SavedFile, ...]:
        return self.files

    def load_state(self, folder: str) -> None:
        self.holds = (Path(folder) / f"rank_{self.rank}").read_text()

    def generate(self, text: str, version: int) -> Stored[str, RolloutInfo]:
        return Stored(text, info_of(version))

    def save_rollouts(self, folder: str, shards: list[str], infos: list[RolloutInfo]) -> tuple[SavedFile, ...]:
        if self.rank:
            return ()
        both = enumerate(zip(shards, infos, strict=True))
        return tuple(write(Path(folder) / str(number), json.dumps([shard, info.versions[0]])) for number, (shard, info) in both)

    def load_rollouts(self, folder: str, number: int) -> Stored[str, RolloutInfo]:
        text, version = json.loads((Path(folder) / str(number)).read_text())
        return Stored(f"{text}, read by rank {self.rank}", info_of(version))


def info_of(version: int) -> RolloutInfo:
    return RolloutInfo((0,), (0,), (1,), (1,), (0,), (version,), 1.0)


def write(path: Path, text: str) -> SavedFile:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return SavedFile(path.name, len(text), hashlib.sha256(text.encode()).hexdigest())


def groups_of(local_group: Any, *, value: bool = True, turn: Turns | None = None) -> tuple[Groups, list[Any]]:
    calls: list[Any] = []
    two = [local_group(name, [Model(0, name), Model(1, name)], calls) for name in ("policy", "value")]
    return Groups(two[0], local_group("reward", [None], calls), None, two[1] if value else None, None, turn or Turns()), calls


def sampled(groups: Groups, text: str, version: int) -> Shard:
    (handle,) = groups.policy.submit(Model.generate, [(text, version), None])
    return Shard(handle)


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    recorder = Recorder(RunFolder.create(tmp_path, "run"))
    (tmp_path / "run" / "config.yaml").write_text("run: {}\n")
    return recorder


def newest(tmp_path: Path) -> Any:
    found = CheckpointStore(tmp_path / "run" / "checkpoints").newest(pytest.fail)
    assert found is not None
    return found


# --- export


def test_policy_and_value_are_written_by_all_their_ranks(local_group: Any, tmp_path: Path) -> None:
    groups, calls = groups_of(local_group)
    export(groups, lambda role: str(tmp_path / role))
    assert [(name, rank) for name, rank, _ in calls] == [(f"{role}.export", rank) for role in ("policy", "value") for rank in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy", "value"]


def test_without_a_value_model_there_is_one_export(local_group: Any, tmp_path: Path) -> None:
    groups, _ = groups_of(local_group, value=False)
    export(groups, lambda role: str(tmp_path / role))
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


# --- saving and restoring


def test_a_checkpoint_holds_all_ranks_the_state_and_the_config(local_group: Any, tmp_path: Path, recorder: Recorder) -> None:
    groups, _ = groups_of(local_group)
    recorder.metrics(3, {"objective/kl": 1.0})
    Checkpointer(CheckpointSection(), groups, recorder).save(RunState(step=3, kl_coef=0.25), Pipeline(9))
    Checkpointer(CheckpointSection(asynchronous=False), groups, recorder).save(RunState(step=4, kl_coef=0.5), Pipeline(9))
    found = newest(tmp_path)
    assert set(found.files) == {"policy/rank_0", "policy/rank_1", "value/rank_0", "value/rank_1", "config.yaml"}
    state = RunState.from_dict(found.state)
    assert (found.step, state.step, state.kl_coef, state.pending) == (4, 4, 0.5, {})
    assert state.metrics_bytes == (tmp_path / "run" / "metrics.jsonl").stat().st_size > 0


def test_only_what_is_on_its_way_and_whole_counts(local_group: Any, tmp_path: Path, recorder: Recorder) -> None:
    groups, _ = groups_of(local_group)
    checkpointer = Checkpointer(CheckpointSection(), groups, recorder)
    checkpointer.save(RunState(step=3), Pipeline(9))
    assert not CheckpointStore(tmp_path / "run" / "checkpoints").all()
    checkpointer.poll()
    assert newest(tmp_path).step == 3


def test_what_was_saved_comes_back_to_its_rank(local_group: Any, tmp_path: Path, recorder: Recorder) -> None:
    groups, _ = groups_of(local_group)
    Checkpointer(CheckpointSection(asynchronous=False), groups, recorder).save(RunState(step=3), Pipeline(9))
    other, _ = groups_of(local_group)
    workers = [worker for group in other.trained() for worker in group.workers]  # type: ignore[attr-defined]
    for worker in workers:
        worker.holds = "nothing"
    Checkpointer(CheckpointSection(), other, recorder).restore(newest(tmp_path), RunState(step=3), Pipeline(9))
    assert [worker.holds for worker in workers] == [f"{role} of rank {rank}" for role in ("policy", "value") for rank in (0, 1)]


def test_rollouts_of_policies_that_are_gone_are_kept_and_others_are_not(local_group: Any, tmp_path: Path, recorder: Recorder) -> None:
    """k = 2 before step 4: step 4 has version 2, step 5 has version 3; step 6, of version 4, can be sampled again."""
    groups, _ = groups_of(local_group)
    pending = {step: [sampled(groups, f"step {step}, shard {n}", step - 2) for n in range(3)] for step in (4, 5, 6)}
    state = RunState(step=4)
    Checkpointer(CheckpointSection(asynchronous=False), groups, recorder).save(state, Pipeline(9, 2, 7, pending))
    found = newest(tmp_path)
    assert {name for name in found.files if name.startswith("pending")} == {f"pending/{step}/{n}" for step in (4, 5) for n in range(3)}

    again = Pipeline(9, 2)
    Checkpointer(CheckpointSection(), groups, recorder).restore(found, RunState.from_dict(found.state), again)
    assert list(again.pending) == [4, 5] and list(again.due(4)) == [6]
    payloads = [shard.rollouts.payload for shard in again.shards()]  # type: ignore[attr-defined]
    owners = [0, 1, 1]  # three shards over two ranks, contiguous
    assert payloads == [f"step {step}, shard {n}, read by rank {owners[n]}" for step in (4, 5) for n in range(3)]
    collect_rollouts(groups.policy, again.pending[5])
    assert again.staleness(5, again.pending[5]).means()["rollout/staleness"] == 2.0


def test_where_groups_take_turns_each_is_woken_for_it(local_group: Any, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = Turns()
    turns: list[tuple[str, str]] = []
    monkeypatch.setattr(Turns, "__call__", lambda self, *groups, needs="weights": turns.append((groups[0].name, needs)))
    groups, _ = groups_of(local_group, turn=turn)
    Checkpointer(CheckpointSection(asynchronous=False), groups, recorder).save(RunState(step=3), Pipeline(9))
    assert turns == [("policy", "training"), ("value", "training")]
