from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.engine import SavedFile
from rlhf_dist.runs.checkpoints import Checkpoint, CheckpointStore, hash_of, read_checkpoint, recorded_files


def save(store: CheckpointStore, step: int, text: str = "weights") -> Checkpoint:
    folder = store.begin(step)
    (folder / "policy").mkdir(exist_ok=True)
    (folder / "policy" / "model.safetensors").write_text(text)
    return store.commit(step, {"step": step, "kl_coef": 0.1 + 0.2})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def store(root: Path) -> CheckpointStore:
    return CheckpointStore(root)


def newest(store: CheckpointStore) -> tuple[int | None, list[str]]:
    refused: list[str] = []
    found = store.newest(refused.append)
    return None if found is None else found.step, refused


def test_a_checkpoint_and_its_manifest(store: CheckpointStore, root: Path) -> None:
    save(store, 10)
    manifest = json.loads((root / "step_000010" / "manifest.json").read_text())
    assert manifest["step"] == 10 and manifest["files"]["policy/model.safetensors"][0] == 7
    assert manifest["versions"]["torch"] and len(manifest["sha256"]) == 64
    found = store.newest(print)
    assert found is not None and found.folder == root / "step_000010"
    assert found.state == {"step": 10, "kl_coef": 0.1 + 0.2}
    assert found.files["policy/model.safetensors"].sha256 == hash_of(found.folder / "policy" / "model.safetensors")


def test_a_half_written_one_never_counts_and_is_cleared(store: CheckpointStore, root: Path) -> None:
    save(store, 1)
    (store.begin(2) / "model").write_text("half")
    assert newest(store) == (1, [])
    (store.begin(2) / "more").write_text("by another process")
    assert {path.name for path in store.partial(2).iterdir()} == {"model", "more"}
    store.clear()
    assert [path.name for path in root.iterdir()] == ["step_000001"]


@pytest.mark.parametrize("at", ["rename", "fsync"])
def test_a_kill_before_the_rename_leaves_the_old_one(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    save(store, 1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, at, killed)
    with pytest.raises(KeyboardInterrupt):
        save(store, 2)
    monkeypatch.undo()
    assert newest(store) == (1, [])
    save(store, 2)
    assert newest(store) == (2, [])


def test_everything_is_on_disk_before_it_counts(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, their folders, then the rename, then the folder that holds the new name."""
    done: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda number: (done.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number))[1])
    monkeypatch.setattr(os, "rename", lambda old, new: (done.append("rename"), rename(old, new))[1])
    save(store, 3)
    names = [Path(each).name for each in done]
    at = names.index("rename")
    assert names[at + 1 :] == ["checkpoints"]
    assert {"model.safetensors", "policy", ".step_000003.partial"} < set(names[:at])
    assert any("manifest.json" in name for name in names[:at])


def test_only_the_newest_are_kept(store: CheckpointStore, root: Path) -> None:
    for step in (1, 2, 3, 10, 1_000_000):
        save(store, step)
    assert store.prune(2, 1_000_000) == [1, 2, 3]
    assert [checkpoint.step for checkpoint in store.all()] == [10, 1_000_000]
    assert sorted(path.name for path in root.iterdir()) == ["step_000010", "step_1000000"]
    assert store.prune(3, 1_000_000) == []
    with pytest.raises(ValueError, match="keep"):
        store.prune(0, 1)


def test_what_was_refused_goes_and_never_what_was_just_committed(store: CheckpointStore, root: Path) -> None:
    """A run that went back to step 4: 6 was damaged, 8 lacked a readable manifest."""
    for step in (2, 4, 6, 8):
        save(store, step)
    (root / "step_000006" / "policy" / "model.safetensors").write_text("damage")
    (root / "step_000008" / "manifest.json").write_text("{")
    save(store, 5)
    assert store.prune(1, 5) == [2, 4, 6, 8]
    assert newest(store) == (5, [])


def test_where_none_is_whole_nobody_begins_anew(store: CheckpointStore, root: Path) -> None:
    for step in (1, 2):
        (save(store, step).folder / "policy" / "model.safetensors").write_text("damage")
    refused: list[str] = []
    with pytest.raises(UserError, match="none of the run's 2 checkpoints can be used") as caught:
        store.newest(refused.append)
    assert len(refused) == 2 and caught.value.where == str(root)


def test_what_damaged_means(store: CheckpointStore, root: Path) -> None:
    """Every kind of damage is named, and the newest whole one is taken."""
    save(store, 1)
    whole = save(store, 2, "weights of step 2")
    weights, manifest = whole.folder / "policy" / "model.safetensors", whole.folder / "manifest.json"
    written = manifest.read_text()
    weights.write_text("weights of step 3")
    assert newest(store) == (
        1,
        [
            "checkpoint step_000002 is damaged and not used: "
            "checkpoint file policy/model.safetensors has other contents than were written, or cannot be read"
        ],
    )  # fmt: skip
    weights.write_text("w")
    assert newest(store)[0] == 1 and "has 1 bytes, not 17" in newest(store)[1][0]
    weights.unlink()
    assert newest(store)[0] == 1 and "is missing" in newest(store)[1][0]
    weights.write_text("weights of step 2")
    assert newest(store) == (2, [])
    for text, reason in (
        ("{", "cannot be read"),
        (written.replace('"kl_coef": 0.3', '"kl_coef": 0.4'), "was changed after it was written"),
        (written.replace('"format": 2', '"format": 9'), "its format is 9"),
        ("[]", "cannot be read"),
        ("\x00", "cannot be read"),
    ):
        manifest.write_text(text)
        step, refused = newest(store)
        assert step == 1 and len(refused) == 1 and reason in refused[0] and "step_000002" in refused[0]
    manifest.unlink()
    assert newest(store)[0] == 1


def test_any_changed_bit_is_noticed(store: CheckpointStore) -> None:
    whole = save(store, 1, "0123456789" * 20)
    draw = random.Random(0)
    for path in sorted(whole.folder.rglob("*.*")):
        original = path.read_bytes()
        for _ in range(200):
            damaged = bytearray(original)
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
            path.write_bytes(bytes(damaged))
            refused: list[str] = []
            try:
                assert store.newest(refused.append) is not None  # JSON has room for changes that mean nothing
                assert path.name == "manifest.json" and read_checkpoint(whole.folder) == whole
            except UserError:
                assert len(refused) == 1
        path.write_bytes(original)
    assert newest(store) == (1, [])


def test_a_refused_one_makes_room_for_the_same_step(store: CheckpointStore, root: Path) -> None:
    save(store, 1)
    damaged = save(store, 2)
    (damaged.folder / "policy" / "model.safetensors").write_text("damage")
    save(store, 2, "new")
    assert newest(store) == (2, [])
    store.prune(2, 2)
    assert sorted(path.name for path in root.iterdir()) == ["step_000001", "step_000002"]


def test_files_of_other_machines_must_be_visible(store: CheckpointStore) -> None:
    folder = store.begin(4)
    (folder / "a").write_text("abc")
    with pytest.raises(UserError, match="cannot be seen from the coordinator"):
        store.commit(4, {}, [SavedFile("elsewhere", 3, "")])
    with pytest.raises(UserError, match=r"written with 9 bytes, but has 3 bytes"):
        store.commit(4, {}, [SavedFile("a", 9, "")])
    assert store.all() == []


def test_what_others_hashed_is_not_hashed_again(store: CheckpointStore) -> None:
    folder = store.begin(5)
    (folder / "a").write_text("abc")
    assert store.commit(5, {}, [SavedFile("a", 3, "said")]).files["a"].sha256 == "said"


def test_all_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(b"abc")
    assert recorded_files(tmp_path) == (SavedFile("b/c", 3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),)


def test_misuse(store: CheckpointStore) -> None:
    assert newest(store) == (None, []) and store.all() == []
    with pytest.raises(FileNotFoundError):
        store.commit(1, {})
    store.begin(1)
    with pytest.raises(ValueError, match="empty"):
        store.commit(1, {})
    (store.begin(1) / "a").write_text("a")
    with pytest.raises(ValueError):
        store.commit(1, {"kl": float("nan")})
    assert store.all() == []
