"""The SFT config, read as the command line reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.loading import dump_config, load_config
from rlhf_dist.config.sft import SFTConfig

GIVEN = ("data.train=a.jsonl", "model.model=m")


def test_defaults_and_round_trip(tmp_path: Path) -> None:
    config = load_config(SFTConfig, None, GIVEN)
    assert (config.run.name, config.sft.loss_on, config.training.batch_size, config.model.lora) == ("sft", "completion", 32, None)
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(config))
    assert load_config(SFTConfig, path) == config


@pytest.mark.parametrize(
    ("override", "message"), [("sft.loss_onn=all", "loss_on"), ("run.steps=3", "no such key"), ("sft.loss_on=prompt", "sft.loss_on")]
)
def test_typos_and_wrong_values_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(SFTConfig, None, (*GIVEN, override))
