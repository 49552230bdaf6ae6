"""The config of `rlhf-dist reward`, read as the command line reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.loading import dump_config, load_config
from rlhf_dist.config.reward_model import RewardModelConfig

GIVEN = ("data.train=a.jsonl", "model.model=m")


def test_defaults_and_round_trip(tmp_path: Path) -> None:
    config = load_config(RewardModelConfig, None, GIVEN)
    section = config.reward_model
    assert (config.run.name, section.ranking, section.margins, section.centring) == ("reward", "plackett_luce", False, 0.0)
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(config))
    assert load_config(RewardModelConfig, path) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward_model.margin=true", "margins"),
        ("reward_model.centring=-1", "reward_model.centring"),
        ("reward_model.ranking=best", "reward_model.ranking"),
        ("model.quantize=nf4", "set lora"),
    ],
)
def test_typos_and_wrong_values_are_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(RewardModelConfig, None, (*GIVEN, override))
