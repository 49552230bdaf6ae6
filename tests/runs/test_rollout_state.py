"""A shard of rollouts comes back from its files bit for bit, or not at all."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.contracts.roles import RolloutInfo
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.runs import rollout_state
from rlhf_dist.runs.rollout_state import read_shard, write_shard


def shard(**columns: tuple[Any, ...]) -> tuple[ExperienceBatch, RolloutInfo]:
    mask_BT = torch.tensor([[True, True, False], [True, True, True]])
    batch = ExperienceBatch(
        prompt_tokens_BP=torch.tensor([[5, 6], [0, 7]]),
        prompt_mask_BP=torch.tensor([[True, True], [False, True]]),
        response_tokens_BT=torch.tensor([[8, 9, 0], [3, 2, 1]]),
        response_mask_BT=mask_BT,
        response_attention_BT=mask_BT.clone(),
        prompt_id_B=torch.tensor([2**62, 1]),
        sample_index_B=torch.tensor([0, 1]),
        policy_version_B=torch.tensor([4, 4]),
        stop_reason_B=torch.tensor([0, 1]),
        rollout_logprobs_BT=torch.tensor([[-0.1, -1e-30, 0.0], [-1 / 3, -2.0, -3.0]]).t().contiguous().t(),  # not contiguous
        prompts=("a \u2028 line", ""),
        completions=("ß\n", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")),
        columns=columns,
    )
    tally = Tally()
    tally.add("rollout/kept_mass", 0.1 + 0.2, 3.0)
    tally.peak("longest", 7.0)
    info = RolloutInfo((2**62, 1), (0, 1), (2, 1), (2, 3), (0, 1), (4, 4), 1.25, tally, dropped_prompts=3, truncated_prompts=1)
    return batch, info


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    batch, info = shard(answer=("w1", None), weight=(0.1, 3), flags=([1, 2], {"k": "v"}))
    write_shard(tmp_path / "pending" / "4", 12, batch, info)
    found, told = read_shard(tmp_path / "pending" / "4", 12)
    for each in dataclasses.fields(batch):
        was, now = getattr(batch, each.name), getattr(found, each.name)
        if isinstance(was, torch.Tensor):
            assert torch.equal(was, now) and was.dtype == now.dtype, each.name
        else:
            assert was == now, each.name
    assert told == info and told.tally.means() == info.tally.means()


def test_numbers_that_are_none_come_back(tmp_path: Path) -> None:
    """A Parquet file may hold them, alone or in lists."""
    column = (float("nan"), [float("inf"), float("-inf"), float("nan"), -0.0, 5e-324, 2**70])
    write_shard(tmp_path, 0, *shard(weight=column))
    assert repr(read_shard(tmp_path, 0)[0].columns["weight"]) == repr(column)


@pytest.mark.parametrize("field", ["prompts", "completions"])
def test_text_that_could_not_be_read_again_is_not_written(tmp_path: Path, field: str) -> None:
    batch, info = shard()
    with pytest.raises(UserError, match="a prompt or completion cannot be saved"):
        write_shard(tmp_path / "new", 0, dataclasses.replace(batch, **{field: ("half \ud83d", "")}), info)
    assert not list(tmp_path.iterdir()), "nothing half-written"


@pytest.mark.parametrize("name", ["shard_0000.json", "shard_0000.safetensors"])
def test_a_full_disk_is_told_in_words(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full takes no byte of the text; safetensors writes beside and renames, so its error stands here as a full disk gave it."""

    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    if name.endswith(".json"):
        (tmp_path / name).symlink_to("/dev/full")
    else:
        monkeypatch.setattr(rollout_state, "save_file", full)
    with pytest.raises(UserError, match="the disk is full") as caught:
        write_shard(tmp_path, 0, *shard())
    assert caught.value.where == str(tmp_path)


@pytest.mark.parametrize("name", ["shard_0000.json", "shard_0000.safetensors"])
def test_what_the_file_system_refuses_is_told_in_words(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"it cannot be written \(.*Is a directory") as caught:
        write_shard(tmp_path, 0, *shard())
    assert caught.value.where == str(tmp_path)


BAD = [(object(), 1), ((1, 2), (3, 4)), (b"bytes", ""), ({1: "key"}, {}), (datetime(2026, 1, 2), None), ("half \ud83d", "")]


@pytest.mark.parametrize("bad", BAD)
def test_a_column_that_json_would_change_is_refused_by_name(tmp_path: Path, bad: tuple[Any, ...]) -> None:
    with pytest.raises(UserError, match="column 'odd' holds values") as caught:
        write_shard(tmp_path, 0, *shard(odd=bad))
    assert "rollout.max_staleness=0" in caught.value.fix and not list(tmp_path.iterdir()), "nothing half-written"


@pytest.mark.parametrize("name", ["shard_0000.json", "shard_0000.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
def test_damaged_files_are_an_error_that_names_the_shard(tmp_path: Path, name: str, damage: str) -> None:
    write_shard(tmp_path, 0, *shard())
    path = tmp_path / name
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        path.write_text("{}")
    with pytest.raises(UserError, match="shard 0 of the rollouts cannot be read") as caught:
        read_shard(tmp_path, 0)
    assert caught.value.fix == "use another checkpoint"
