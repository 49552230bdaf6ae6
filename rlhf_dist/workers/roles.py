"""Which worker plays which role."""

from __future__ import annotations

from typing import Any

from rlhf_dist.config.dpo import DPOConfig
from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.config.reward_model import RewardModelConfig
from rlhf_dist.config.sft import SFTConfig
from rlhf_dist.engines.process import Rank

ROLES = ("policy", "reference", "value", "reward")
"""Those with an engine: a section of their own in the config, ranks that form a process group."""
ROLLOUT = "rollout"


def needed_roles(config: PPOConfig) -> list[str]:
    """The engine roles a run starts: no value engine without GAE, no reference engine with LoRA."""
    absent = {name for name, needed in (("value", config.needs_value), ("reference", config.needs_reference)) if not needed}
    return [role for role in ROLES if role not in absent]


def section_of(config: PPOConfig, role: str) -> EngineSection:
    """The config section of a role."""
    section: EngineSection = getattr(config, role)
    return section


def build_worker(role: str, config: PPOConfig, rank: Rank) -> Any:
    """Loads a role's models on this rank; they leave the device at once where engines take turns.

    Raises:
        ValueError: no such role.
    """
    worker = _loaded(role, config, rank)
    if config.placement.offload == "idle":
        worker.rest("nothing")
    return worker


def _loaded(role: str, config: PPOConfig, rank: Rank) -> Any:
    """Imports are late, so that no process imports what it does not host."""
    if role == "policy":
        from rlhf_dist.workers.policy import PolicyWorker

        return PolicyWorker(config, rank)
    if role == "reference":
        from rlhf_dist.workers.reference import ReferenceWorker

        return ReferenceWorker(config, rank)
    if role == "value":
        from rlhf_dist.workers.value import ValueWorker

        return ValueWorker(config, rank)
    if role == "reward":
        from rlhf_dist.workers.reward import RewardWorker

        return RewardWorker(config, rank)
    if role == ROLLOUT:
        from rlhf_dist.workers.rollout import RolloutWorker

        return RolloutWorker(config, rank)
    raise ValueError(f"there is no role {role!r}: {', '.join((*ROLES, ROLLOUT))}")


def build_model(config: SFTConfig | RewardModelConfig | DPOConfig, rank: Rank) -> Any:
    """Loads the one model of a supervised stage, and its rows, on this rank."""
    if isinstance(config, SFTConfig):
        from rlhf_dist.workers.sft import build_sft

        return build_sft(config, rank)
    if isinstance(config, RewardModelConfig):
        from rlhf_dist.workers.reward_model import build_reward_model

        return build_reward_model(config, rank)
    from rlhf_dist.workers.dpo import build_dpo

    return build_dpo(config, rank)
