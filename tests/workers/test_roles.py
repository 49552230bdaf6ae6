"""Which roles a run starts, what they are told, and who plays them."""

import pytest

from rlhf_dist.config.engines import PolicySection, ReferenceSection, ValueSection
from rlhf_dist.config.rewards import RewardSection
from rlhf_dist.engines.process import Rank
from rlhf_dist.workers.policy import PolicyWorker
from rlhf_dist.workers.reference import ReferenceWorker
from rlhf_dist.workers.reward import RewardWorker
from rlhf_dist.workers.roles import ROLES, ROLLOUT, build_worker, needed_roles, section_of
from rlhf_dist.workers.rollout import RolloutWorker
from rlhf_dist.workers.value import ValueWorker


@pytest.mark.parametrize(
    ("changes", "roles"),
    [
        ({}, ["policy", "reference", "value", "reward"]),
        ({"policy.lora": {"r": 2}}, ["policy", "value", "reward"]),
        ({"algorithm.estimator": "reinforce"}, ["policy", "reference", "reward"]),
        ({"algorithm.estimator": "grpo", "policy.lora": {"r": 2}}, ["policy", "reward"]),
    ],
)
def test_only_the_roles_that_are_needed_are_started(changes, roles, configured) -> None:
    assert needed_roles(configured(changes)) == roles


def test_every_role_has_its_section(configured) -> None:
    sections = [type(section_of(configured(), role)) for role in ROLES]
    assert sections == [PolicySection, ReferenceSection, ValueSection, RewardSection]


def test_every_role_has_its_worker(configured, plain_rank) -> None:
    config = configured()
    kinds = [type(build_worker(role, config, plain_rank)) for role in ROLES]
    assert kinds == [PolicyWorker, ReferenceWorker, ValueWorker, RewardWorker]


def test_a_rollout_group_has_a_worker_and_no_engine_section(configured) -> None:
    config = configured({"rollout.ranks": 1, "placement.launcher": "ray"})
    assert isinstance(build_worker(ROLLOUT, config, Rank(0, 1, 0, "cpu")), RolloutWorker)
    assert ROLLOUT not in needed_roles(config)


def test_an_unknown_role_is_no_reward(configured, plain_rank) -> None:
    with pytest.raises(ValueError, match="critic"):
        build_worker("critic", configured(), plain_rank)
