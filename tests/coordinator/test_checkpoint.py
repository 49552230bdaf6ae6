from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_dist.coordinator.checkpoint import checkpoint, export
from rlhf_dist.coordinator.shards import Groups
from rlhf_dist.runs.checkpoints import CheckpointStore
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.runs.state import RunState


class Model:
    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.folders: list[str] = []

    def export(self, folder: str) -> None:
        self.folders.append(folder)
        if self.rank == 0:
            Path(folder).mkdir(parents=True)
            (Path(folder) / "model.safetensors").write_text("weights")


def groups_of(local_group: Any, *, value: bool) -> tuple[Groups, list[Any]]:
    calls: list[Any] = []
    two = [local_group(name, [Model(0), Model(1)], calls) for name in ("policy", "value")]
    return Groups(two[0], local_group("reward", [None], calls), None, two[1] if value else None), calls


def test_policy_and_value_are_written_by_all_their_ranks(local_group: Any, tmp_path: Path) -> None:
    groups, calls = groups_of(local_group, value=True)
    export(groups, lambda role: str(tmp_path / role))
    assert [(name, rank) for name, rank, _ in calls] == [
        ("policy.export", 0),
        ("policy.export", 1),
        ("value.export", 0),
        ("value.export", 1),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy", "value"]


def test_without_a_value_model_there_is_one_export(local_group: Any, tmp_path: Path) -> None:
    groups, _ = groups_of(local_group, value=False)
    export(groups, lambda role: str(tmp_path / role))
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_a_checkpoint_counts_once_it_is_whole(local_group: Any, tmp_path: Path) -> None:
    groups, _ = groups_of(local_group, value=True)
    recorder = Recorder(RunFolder.create(tmp_path, "run"))
    for step in (10, 20):
        checkpoint(groups, recorder, RunState(step=step), keep=1)
    latest = CheckpointStore(tmp_path / "run" / "checkpoints").latest()
    assert latest is not None and latest.step == 20
    assert set(latest.files) == {"policy/model.safetensors", "value/model.safetensors"}
    assert len(CheckpointStore(tmp_path / "run" / "checkpoints").all()) == 1
    assert all(".partial" in folder for folder in groups.policy.workers[1].folders)  # type: ignore[attr-defined]
