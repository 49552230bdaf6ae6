from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import ExperienceBatch, StopReason
from rlhf_dist.runs.rollout_log import CORE, read_rollouts, reward_names, write_rollouts

MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
ATTENTION = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)


def batch(poison: float = 0.0, **filled: Any) -> ExperienceBatch:
    """Three samples: three tokens, two tokens and a tool token, none; masked slots hold `poison`."""

    def tokens(values: list[list[float]]) -> torch.Tensor:
        return torch.where(MASK, torch.tensor(values), poison)

    fields: dict[str, Any] = {
        "rollout_logprobs_BT": tokens([[-1.0, -2.0, -3.0], [-1.0, -1.0, 0], [0, 0, 0]]),
        "old_logprobs_BT": tokens([[-1.5, -2.0, -2.75], [-1.0, -1.25, 0], [0, 0, 0]]),
        "ref_logprobs_BT": tokens([[-1.0, -1.0, -1.0], [-2.0, -2.0, 0], [0, 0, 0]]),
        "score_B": torch.tensor([0.5, -1.0, 2.0]),
    }
    return ExperienceBatch(
        prompt_tokens_BP=torch.zeros(3, 4, dtype=torch.long),
        prompt_mask_BP=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.bool),
        response_tokens_BT=torch.zeros(3, 3, dtype=torch.long),
        response_mask_BT=MASK,
        response_attention_BT=ATTENTION,
        prompt_id_B=torch.tensor([2**62 + 1, -5, 7]),
        sample_index_B=torch.tensor([0, 1, 0]),
        policy_version_B=torch.tensor([3, 3, 2]),
        stop_reason_B=torch.tensor([StopReason.STOP_TOKEN, StopReason.LENGTH, StopReason.STOP_STRING]),
        prompts=("one", "two", "日本"),
        completions=(" a", "", " c\n"),
        **(fields | filled),
    )


def rows(path: Path) -> list[dict[str, Any]]:
    return read_rollouts(path).to_pylist()


def test_every_column_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "step_000001.parquet"
    count = write_rollouts(path, batch(), {"reward/joy": [1.0, None, 3.0], "kept": [True, True, False]})
    assert count == 3
    assert rows(path) == [
        {
            "prompt_id": 2**62 + 1,
            "sample_index": 0,
            "prompt": "one",
            "completion": " a",
            "score": 0.5,
            "kl": -0.5 - 1.0 - 1.75,
            "rollout_gap": 0.75 / 3,
            "prompt_tokens": 3,
            "response_tokens": 3,
            "stop_reason": "stop_token",
            "policy_version": 3,
            "kept": True,
            "reward/joy": 1.0,
        },
        {
            "prompt_id": -5,
            "sample_index": 1,
            "prompt": "two",
            "completion": "",
            "score": -1.0,
            "kl": 1.75,
            "rollout_gap": 0.125,
            "prompt_tokens": 4,
            "response_tokens": 3,
            "stop_reason": "length",
            "policy_version": 3,
            "kept": True,
            "reward/joy": None,
        },
        {
            "prompt_id": 7,
            "sample_index": 0,
            "prompt": "日本",
            "completion": " c\n",
            "score": 2.0,
            "kl": 0.0,
            "rollout_gap": None,
            "prompt_tokens": 1,
            "response_tokens": 0,
            "stop_reason": "stop_string",
            "policy_version": 2,
            "kept": False,
            "reward/joy": 3.0,
        },
    ]


@pytest.mark.parametrize("poison", [1e6, float("nan"), float("inf")])
def test_masked_slots_change_nothing(tmp_path: Path, poison: float) -> None:
    write_rollouts(tmp_path / "clean", batch(), {})
    write_rollouts(tmp_path / "poisoned", batch(poison), {})
    assert read_rollouts(tmp_path / "clean").equals(read_rollouts(tmp_path / "poisoned"))


def test_the_schema_is_the_same_whatever_is_filled(tmp_path: Path) -> None:
    details = {"reward/joy": [None, None, None]}
    write_rollouts(tmp_path / "full", batch(), details)
    write_rollouts(tmp_path / "bare", batch(old_logprobs_BT=None, ref_logprobs_BT=None, score_B=None), details)
    full, bare = read_rollouts(tmp_path / "full"), read_rollouts(tmp_path / "bare")
    assert full.schema == bare.schema
    assert full.schema.field("reward/joy").type == pa.float64()
    for name in ("score", "kl", "rollout_gap"):
        assert bare.column(name).null_count == 3
    assert bare.column("kept").to_pylist() == [True] * 3


def test_details_may_bring_the_score_and_more(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "a", batch(), {"score": [1.0, None, 0.25], "advantage": [0.5, 0.5, 0.5], "reward/b": torch.ones(3)})
    table = read_rollouts(tmp_path / "a")
    assert table.column("score").to_pylist() == [1.0, None, 0.25]
    assert table.column_names == [*CORE.names, "advantage", "reward/b"]
    assert reward_names(table) == ["b"]


def test_a_dropped_sample_without_score_is_null_and_a_kept_one_an_error(tmp_path: Path) -> None:
    nameless = batch(score_B=torch.tensor([float("nan"), 1.0, 2.0]))
    write_rollouts(tmp_path / "a", nameless, {"kept": [False, True, True]})
    assert read_rollouts(tmp_path / "a").column("score").to_pylist() == [None, 1.0, 2.0]
    with pytest.raises(ValueError, match="row 0 is kept"):
        write_rollouts(tmp_path / "b", nameless, {})


@pytest.mark.parametrize(
    ("details", "message"),
    [
        ({"reward/joy": [1.0]}, "1 values for 3 samples"),
        ({"kl": [1.0, 1.0, 1.0]}, "kl comes from the batch"),
        ({"reward/joy": [1.0, float("nan"), None]}, "row 1"),
    ],
)
def test_bad_details_write_nothing(tmp_path: Path, details: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_rollouts(tmp_path / "a.parquet", batch(), details)
    assert list(tmp_path.iterdir()) == []


def test_reading_what_is_no_rollout_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_rollouts(tmp_path / "absent.parquet")
    with pytest.raises(UserError, match="cannot read"):
        read_rollouts(tmp_path)  # a folder of files is not one step
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(UserError, match="cannot read"):
        read_rollouts(tmp_path / "text.parquet")
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="lacks prompt_id"):
        read_rollouts(tmp_path / "other.parquet")
