"""A module built again with the weights of a capsule, and the first number of a row that is not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_dist.config.engines import PolicySection
from rlhf_dist.config.errors import UserError
from rlhf_dist.runs.capsule import TRAINED, Capsule, Facts
from rlhf_dist.workers.replay_subject import alone, rebuilt, token_fault
from rlhf_dist.workers.training import supervised_policy
from rlhf_dist.workers.weight_sync import trained_weights_of


def test_adapters_are_those_of_the_capsule_or_refused(tiny_model: Path, tmp_path: Path) -> None:
    section = PolicySection.model_validate({"model": str(tiny_model), "lora": {"r": 2}})
    capsule = Capsule(tmp_path, Facts("sft", "model", "loss", 1.0, 1.0, 0.1), ())

    def build(given: PolicySection) -> Any:
        assert given.model == str(tiny_model), "the base, which is not copied"
        return supervised_policy(given, 3)

    weights = {name: torch.randn(weight.shape) for name, weight in trained_weights_of(build(section).model).items()}
    save_file(weights, tmp_path / TRAINED)
    held = trained_weights_of(rebuilt(capsule, section, build).model)
    assert weights.keys() == held.keys() and all(torch.equal(held[name], weight) for name, weight in weights.items())
    weights = load_file(tmp_path / TRAINED)
    weights.pop(next(iter(weights)))
    save_file(weights, tmp_path / TRAINED)
    with pytest.raises(UserError, match="do not fit the base model"):
        rebuilt(capsule, section, build)
    (tmp_path / TRAINED).write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        rebuilt(capsule, section, build)


def test_the_outputs_of_some_rows_are_as_narrow_as_these_alone(shard_of: Any, ragged: Any) -> None:
    batch, outputs = shard_of(ragged).select([3]), {"logprobs_BT": torch.arange(42.0).view(7, 6), "score_B": torch.arange(7.0)}
    found = alone(outputs, [3], batch)
    assert found["logprobs_BT"].tolist() == [[18, 19, 20, 21]] and found["score_B"].tolist() == [3]
    assert alone({"score_B": torch.arange(7.0)}, [5, 1], object())["score_B"].tolist() == [5, 1]


def test_the_first_token_that_is_trained_on_and_not_finite_is_named(shard_of: Any, ragged: Any) -> None:
    batch = shard_of(ragged)
    values_BT = torch.zeros(batch.response_mask_BT.shape)
    assert token_fault("x", values_BT, batch, 3) == token_fault("x", None, batch) == ""
    values_BT[3, 4:] = math.nan  # padding
    assert token_fault("x", values_BT, batch, 3) == ""
    values_BT[3, 2:4] = math.inf
    token = int(batch.response_tokens_BT[3, 2])
    assert token_fault("x", values_BT, batch, 3, " of y") == f"x is inf at response token 3 of y (id {token}), and at 1 more"
