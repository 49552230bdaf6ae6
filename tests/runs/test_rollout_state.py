"""A shard of rollouts comes back from its files bit for bit, or not at all."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.contracts.roles import RolloutInfo
from rlhf_dist.contracts.tally import Tally
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


@pytest.mark.parametrize("bad", [(object(), 1), ((1, 2), (3, 4)), (b"bytes", ""), ({1: "key"}, {})])
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
