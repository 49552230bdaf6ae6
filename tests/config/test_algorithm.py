"""`algorithm`: defaults of the numerics, and a bootstrap that needs a critic."""

import pytest
from pydantic import ValidationError

from rlhf_dist.config.algorithm import AlgorithmSection, ImportanceSection, KlSection


def test_defaults_follow_the_numerics():
    section = AlgorithmSection()
    assert (section.gamma, section.lam, section.epochs, section.clip_low, section.clip_high, section.value_clip) == (
        1.0,
        0.95,
        4,
        0.2,
        0.2,
        0.2,
    )
    assert (section.whitens_advantages, section.whiten_rewards, section.reduction, section.truncated) == (
        True,
        False,
        "token_mean",
        "terminal",
    )
    assert (KlSection().target, KlSection().horizon, KlSection().adaptive) == (6.0, 10000, False)


@pytest.mark.parametrize("estimator", ["reinforce", "rloo", "grpo"])
def test_bootstrapping_needs_a_value_model(estimator):
    with pytest.raises(ValidationError, match="truncated: bootstrap needs the value model"):
        AlgorithmSection(estimator=estimator, truncated="bootstrap")
    assert AlgorithmSection(estimator=estimator).truncated == "terminal"
    assert AlgorithmSection(estimator="gae", truncated="bootstrap").truncated == "bootstrap"


@pytest.mark.parametrize("estimator", ["reinforce", "rloo", "grpo"])
def test_whitened_rewards_need_token_rewards(estimator):
    with pytest.raises(ValidationError, match="whiten_rewards scales the token rewards of estimator: gae"):
        AlgorithmSection(estimator=estimator, whiten_rewards=True)
    assert AlgorithmSection(whiten_rewards=True).whiten_rewards


@pytest.mark.parametrize(
    "changes",
    [
        {"estimator": "ppo"},
        {"gamma": 0},
        {"gamma": 1.1},
        {"lam": -0.1},
        {"epochs": 0},
        {"minibatches": 0},
        {"clip_low": 1.0},
        {"clip_high": 0},
        {"dual_clip": 1.0},
        {"value_clip": 0},
        {"entropy_coef": -1},
        {"target_kl_step": 0},
        {"baseline_momentum": 1.0},
        {"reduction": "mean"},
    ],
)
def test_ranges(changes):
    with pytest.raises(ValidationError, match=next(iter(changes))):
        AlgorithmSection(**changes)


def test_a_correction_needs_the_trainers_own_old_log_probs():
    with pytest.raises(ValidationError, match="set old_logprobs: recompute"):
        AlgorithmSection(importance={"correction": "truncated"}, old_logprobs="sampler")
    assert AlgorithmSection(importance={"correction": "none"}, old_logprobs="sampler").importance.cap == 2.0


@pytest.mark.parametrize("changes", [{"cap": 0.9}, {"correction": "clipped"}])
def test_ranges_of_the_importance_section(changes):
    with pytest.raises(ValidationError, match=next(iter(changes))):
        ImportanceSection(**changes)


@pytest.mark.parametrize("changes", [{"coef": -1}, {"target": 0}, {"horizon": 0}])
def test_ranges_of_the_kl_section(changes):
    with pytest.raises(ValidationError, match=next(iter(changes))):
        KlSection(**changes)


@pytest.mark.parametrize(
    ("given", "estimator", "whitens"), [(None, "gae", True), (None, "rloo", False), (True, "grpo", True), (False, "gae", False)]
)
def test_only_a_critics_advantages_are_whitened_unless_asked(given: bool | None, estimator: str, whitens: bool) -> None:
    assert AlgorithmSection(whiten_advantages=given, estimator=estimator).whitens_advantages is whitens
