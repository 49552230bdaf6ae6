from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.runs.checkpoints import CheckpointStore


def save(store: CheckpointStore, step: int, text: str = "weights") -> None:
    folder = store.begin(step)
    (folder / "policy").mkdir()
    (folder / "policy" / "model.safetensors").write_text(text)
    store.publish(step, {"step": step, "kl_coef": 0.1 + 0.2})


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def test_a_checkpoint_and_its_manifest(store: CheckpointStore, tmp_path: Path) -> None:
    save(store, 10)
    folder = tmp_path / "checkpoints" / "step_000010"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 10 and manifest["files"] == {"policy/model.safetensors": 7}
    latest = store.latest()
    assert latest is not None and latest.folder == folder
    assert latest.state == {"step": 10, "kl_coef": 0.1 + 0.2}


def test_a_half_written_one_never_counts_and_is_cleared(store: CheckpointStore, tmp_path: Path) -> None:
    save(store, 1)
    (store.begin(2) / "model").write_text("half")
    latest = store.latest()
    assert latest is not None and latest.step == 1
    (tmp_path / "checkpoints" / "step_000009").mkdir()  # no manifest
    assert [c.step for c in store.all()] == [1]
    save(store, 3)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_000001", "step_000003", "step_000009"]


def test_a_kill_before_the_rename_leaves_the_old_one(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save(store, 2)
    monkeypatch.undo()
    assert [c.step for c in store.all()] == [1]
    save(store, 2)
    assert [c.step for c in store.all()] == [1, 2]


def test_prune_keeps_the_latest_and_the_protected(store: CheckpointStore) -> None:
    for step in (1, 2, 3, 10, 1_000_000):
        save(store, step)
    assert store.prune(2, protect=[1]) == [2, 3]
    assert [c.step for c in store.all()] == [1, 10, 1_000_000]
    assert store.prune(3) == []
    with pytest.raises(ValueError, match="keep"):
        store.prune(0)


def test_the_same_step_again_replaces(store: CheckpointStore, tmp_path: Path) -> None:
    save(store, 1, "old")
    save(store, 1, "newer")
    latest = store.latest()
    assert latest is not None and latest.files == {"policy/model.safetensors": 5}
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


def test_damage_is_named(store: CheckpointStore, tmp_path: Path) -> None:
    save(store, 1)
    weights = tmp_path / "checkpoints" / "step_000001" / "policy" / "model.safetensors"
    weights.write_text("w")
    with pytest.raises(UserError, match="has 1 bytes, not 7"):
        store.latest()
    weights.unlink()
    with pytest.raises(UserError, match="is missing"):
        store.latest()
    (weights.parent.parent / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest cannot be read"):
        store.all()


def test_misuse(store: CheckpointStore, tmp_path: Path) -> None:
    assert store.latest() is None and store.all() == []
    with pytest.raises(FileNotFoundError):
        store.publish(1, {})
    store.begin(1)
    with pytest.raises(ValueError, match="empty"):
        store.publish(1, {})
    (store.begin(1) / "a").write_text("a")
    with pytest.raises(ValueError):
        store.publish(1, {"kl": float("nan")})
    assert store.all() == []
