"""Which stage a config file is for."""

from __future__ import annotations

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.config.stages import STAGES, config_of, stage_of, stage_of_config


@pytest.mark.parametrize(
    ("sections", "stage"),
    [
        ({"data": {}, "policy": {}}, "ppo"),
        ({"data": {}, "rollot": {}, "algorithm": {}}, "ppo"),
        ({"data": {}, "model": {}, "sft": {}}, "sft"),
        ({"model": {}, "reward_model": {}}, "reward"),
        ({"model": {}, "dpo": {}}, "dpo"),
        ({"model": {}, "reference": {}}, "dpo"),
    ],
)
def test_a_section_of_its_own_tells_the_stage(sections: dict[str, object], stage: str) -> None:
    assert stage_of(sections, "f.yaml") == stage


def test_the_whole_config_of_a_stage_tells_it() -> None:
    """Such as the config.yaml that a run leaves."""
    for stage, kind in STAGES.items():
        assert stage_of(list(kind.model_fields), "config.yaml") == stage


@pytest.mark.parametrize(
    ("sections", "fit"),
    [(["data", "model", "training"], "fit sft, reward, dpo"), ([], "fit sft, reward, dpo, ppo"), (["sft", "rollout"], "fit sft, ppo"),
     (["modle"], "fit sft, reward, dpo, ppo")],
)  # fmt: skip
def test_what_fits_several_stages_is_asked_for(sections: list[str], fit: str) -> None:
    with pytest.raises(UserError, match=fit) as caught:
        stage_of(sections, "f.yaml")
    assert caught.value.where == "f.yaml" and "--stage" in caught.value.fix


def test_the_stage_of_a_config() -> None:
    assert [stage_of_config(kind.model_construct()) for kind in STAGES.values()] == list(STAGES)


def test_a_stage_by_name() -> None:
    assert config_of("ppo") is PPOConfig
    with pytest.raises(UserError, match="no stage 'pp0'") as caught:
        config_of("pp0")
    assert all(stage in caught.value.fix for stage in STAGES)
