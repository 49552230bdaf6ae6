"""`reward`: sources told apart by kind, names that differ, length control off by default."""

import pytest
from pydantic import ValidationError

from rlhf_dist.config.rewards import FunctionReward, ModelReward, RewardSection

FUNCTION = {"kind": "function", "name": "length", "path": "rewards.py:length"}
MODEL = {"kind": "model", "name": "sentiment", "model": "classifier", "weight": 0.1, "label": 1, "transform": "log_odds"}


def test_the_kind_chooses_the_type():
    section = RewardSection.model_validate({"sources": [FUNCTION, MODEL]})
    assert [type(source) for source in section.sources] == [FunctionReward, ModelReward]
    assert [source.weight for source in section.sources] == [1.0, 0.1]


def test_length_control_is_off_by_default():
    section = RewardSection.model_validate({"sources": [FUNCTION]})
    assert (section.missing_stop.rule, section.soft_overlong.buffer, section.minimum_length.tokens) == ("none", 0, 0)


def test_two_rewards_of_one_name_are_refused_by_name():
    with pytest.raises(ValidationError, match="two rewards are called 'length'; names must differ"):
        RewardSection.model_validate({"sources": [FUNCTION, FUNCTION]})


@pytest.mark.parametrize(
    "source",
    [
        FUNCTION | {"kind": "http"},
        FUNCTION | {"name": "with space"},
        FUNCTION | {"normalise": "yes"},
        FUNCTION | {"clip": 0},
        MODEL | {"label": -1},
        MODEL | {"transform": "softmax"},
        MODEL | {"path": "a key of another kind"},
        {"kind": "function", "name": "no_path"},
    ],
)
def test_a_wrong_source_is_refused(source):
    with pytest.raises(ValidationError, match="sources"):
        RewardSection.model_validate({"sources": [source]})


def test_a_run_without_rewards_is_refused():
    with pytest.raises(ValidationError, match="sources"):
        RewardSection.model_validate({"sources": []})
