"""Whatever is done to a checkpoint: it is what was saved, or it is refused by one message, also where its hashes agree."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.sft import SFTConfig
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.contracts.roles import RolloutInfo
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.runs.checkpoints import CheckpointStore, read_checkpoint
from rlhf_dist.runs.lineage import check_same_run
from rlhf_dist.runs.metrics import read_metrics
from rlhf_dist.runs.rollout_log import read_rollouts, write_rollouts
from rlhf_dist.runs.rollout_state import read_shard, write_shard
from rlhf_dist.runs.state import RunState

FUZZ = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def shard() -> tuple[ExperienceBatch, RolloutInfo]:
    """Three samples; the two masks are one tensor, as where no tool answers."""
    mask_BT = torch.arange(4)[None] < torch.tensor([[4], [2], [3]])
    ids_B, ones_BP = torch.arange(3), torch.ones(3, 2, dtype=torch.long)
    batch = ExperienceBatch(
        ones_BP, ones_BP.bool(), torch.ones(3, 4, dtype=torch.long), mask_BT, mask_BT, ids_B, ids_B, torch.zeros_like(ids_B), ids_B % 3,
        torch.randn(3, 4), ("a", "b", "c"), ("x", "y", "z"), {"answer": (1, "two", None)},
    )  # fmt: skip
    numbers = (0, 1, 2)
    return batch, RolloutInfo(
        numbers, numbers, (2, 2, 2), (4, 2, 3), numbers, (0, 0, 0), 0.5, Tally({"a": 1.0}, {"a": 2.0}, {"b": float("inf")})
    )


@pytest.fixture
def rollouts(tmp_path: Path) -> Path:
    write_shard(tmp_path / "rollouts", 0, *shard())
    return tmp_path / "rollouts"


def test_rollouts_come_back_bit_for_bit(tmp_path: Path) -> None:
    batch, info = shard()
    write_shard(tmp_path, 7, batch, info)
    found, told = read_shard(tmp_path, 7)
    assert told == info and found.columns == batch.columns and found.prompts == batch.prompts and found.completions == batch.completions
    for name in ("response_mask_BT", "response_attention_BT", "rollout_logprobs_BT", "prompt_id_B"):
        assert torch.equal(getattr(found, name), getattr(batch, name)) and getattr(found, name).dtype == getattr(batch, name).dtype


TEXTS: dict[str, Any] = {
    "prompts that are one text": {"prompts": "abc"},
    "half the completions": {"completions": ["x", "y"]},
    "a completion that is none": {"completions": ["x", "y", None]},
    "half a column": {"columns": {"answer": [1, 2]}},
    "columns that are a list": {"columns": [1, 2, 3]},
    "no columns": {"columns": None},
    "info that is a list": {"info": []},
    "another key": {"more": 1},
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_of_rollouts_that_does_not_fit(rollouts: Path, case: str) -> None:
    path = rollouts / "shard_0000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | TEXTS[case]))
    with pytest.raises(UserError, match="shard 0 of the rollouts cannot be read"):
        read_shard(rollouts, 0)


TENSORS: dict[str, Any] = {
    "fewer rows": lambda t: t | {"prompt_id_B": t["prompt_id_B"][:2]},
    "fewer positions": lambda t: t | {"rollout_logprobs_BT": t["rollout_logprobs_BT"][:, :3].contiguous()},
    "numbers for a mask": lambda t: t | {"response_mask_BT": t["response_mask_BT"].float()},
    "another precision": lambda t: t | {"rollout_logprobs_BT": t["rollout_logprobs_BT"].half()},
    "a field that there is not": lambda t: t | {"more_B": t["prompt_id_B"].clone()},
    "one too few": lambda t: {name: tensor for name, tensor in t.items() if name != "stop_reason_B"},
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_of_rollouts_that_do_not_fit(rollouts: Path, case: str) -> None:
    path = rollouts / "shard_0000.safetensors"
    save_file(TENSORS[case](load_file(path)), path)
    with pytest.raises(UserError, match="shard 0 of the rollouts cannot be read"):
        read_shard(rollouts, 0)


@FUZZ
@given(st.binary(max_size=6), st.integers(0, 900), st.integers(0, 12), st.sampled_from(["shard_0000.json", "shard_0000.safetensors"]))
def test_damaged_rollouts(rollouts: Path, put: bytes, at: int, cut: int, name: str) -> None:
    whole = (rollouts / name).read_bytes()
    (rollouts / name).write_bytes(whole[:at] + put + whole[at + cut :])
    try:
        batch, info = read_shard(rollouts, 0)
        assert len(batch) == len(batch.completions) == len(info.versions) == len(batch.columns["answer"]) or name.endswith("json")
    except UserError as error:
        assert str(rollouts) in error.where
    finally:
        (rollouts / name).write_bytes(whole)


@FUZZ
@given(st.sampled_from(sorted(RunState().to_dict())), ODD)
def test_a_run_state_is_what_was_said_or_refused(key: str, value: Any) -> None:
    given_values = RunState().to_dict() | {key: value}
    try:
        state = RunState.from_dict(given_values)
    except UserError as error:
        assert key in str(error) or key == "format"
    else:
        assert getattr(state, key, 2) == value and not isinstance(value, bool)


@pytest.mark.parametrize(
    "changed",
    [
        {"step": -1},
        {"prompt_cursor": 2**63},
        {"kl_coef": float("nan")},
        {"pending": {"x": 1}},
        {"pending": {"3": -1}},
        {"dropped": {"a": -1}},
    ],
)
def test_counts_count(changed: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="not valid"):
        RunState.from_dict(RunState().to_dict() | changed)


def test_a_bottomless_state() -> None:
    with pytest.raises(UserError, match="not JSON"):
        RunState.from_json("[" * 100_000)


def rehashed(folder: Path, changes: dict[str, Any]) -> None:
    """Other values in a manifest, with the hash that they have."""
    path = folder / "manifest.json"
    values = {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"} | changes
    path.write_text(json.dumps(values | {"sha256": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    store = CheckpointStore(tmp_path / "checkpoints")
    (store.begin(2) / "weights").write_text("w")
    return store.commit(2, RunState(step=2).to_dict()).folder


MANIFESTS: dict[str, Any] = {
    "a step in words": {"step": "two"},
    "a step below 0": {"step": -2},
    "another step than the folder": {"step": 3},
    "no time": {"time": None},
    "a file outside": {"files": {"../weights": [1, "0" * 64]}},
    "an absolute file": {"files": {"/weights": [1, "0" * 64]}},
    "a file with a NUL": {"files": {"a\0b": [1, "0" * 64]}},
    "a file without a hash": {"files": {"weights": [1]}},
    "a state that is a list": {"state": []},
    "versions that are numbers": {"versions": {"torch": 2}},
    "another key": {"more": 1},
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_that_say_what_cannot_be(checkpoint: Path, case: str) -> None:
    rehashed(checkpoint, {})
    assert read_checkpoint(checkpoint).step == 2
    rehashed(checkpoint, MANIFESTS[case])
    with pytest.raises(UserError):
        read_checkpoint(checkpoint)
    told: list[str] = []
    with pytest.raises(UserError, match="none of the run's 1 checkpoints can be used"):
        CheckpointStore(checkpoint.parent).newest(told.append)
    assert "step_000002 is damaged" in told[0]


@FUZZ
@given(st.sampled_from(["format", "step", "time", "files", "state", "versions", "sha256"]), ODD)
def test_any_manifest(checkpoint: Path, key: str, value: Any) -> None:
    before = (checkpoint / "manifest.json").read_text()
    rehashed(checkpoint, {key: value} if key != "sha256" else {})
    if key == "sha256":
        (checkpoint / "manifest.json").write_text(json.dumps(json.loads(before) | {key: value}))
    try:
        found = read_checkpoint(checkpoint)
        assert getattr(found, key) == value or (key == "files" and not found.files)
        found.verify()
    except UserError as error:
        assert str(checkpoint) in error.where
    finally:
        (checkpoint / "manifest.json").write_text(before)


@pytest.mark.parametrize(
    "text",
    ["a: &a [*a]", "run: {name: a, name: b}", "[" * 400, "a: 2020-13-45", "a: !!python/name:os.system", "\0", "just text", "1: {2: 3}"],
)
def test_settings_in_a_checkpoint(tmp_path: Path, text: str) -> None:
    config = SFTConfig.model_validate({"run": {"name": "s"}, "data": {"train": "d"}, "model": {"model": "m"}})
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError):
        check_same_run(tmp_path, config)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b'{"step": 1}\n{', b"[]", b"\0"])
def test_metrics_that_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"metrics|JSON"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_rollouts_of_a_run_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "step.parquet"
    details: dict[str, Any] = {"score": [0.5, 1.0, None], "kept": [True, True, False], "note": ["plain", "plaintext", "plainer"]}
    write_rollouts(path, shard()[0], details)
    table = pq.read_table(path)
    notes = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(table.set_column(table.column_names.index("note"), "note", notes), path)
    with pytest.raises(UserError, match="cannot read the rollouts"):
        read_rollouts(path)
