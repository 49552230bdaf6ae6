"""The stages by the verb that runs them, and which of them a config file is for."""

from __future__ import annotations

from collections.abc import Collection

from rlhf_dist.config.dpo import DPOConfig
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.config.reward_model import RewardModelConfig
from rlhf_dist.config.section import Section
from rlhf_dist.config.sft import SFTConfig

STAGES: dict[str, type[Section]] = {"sft": SFTConfig, "reward": RewardModelConfig, "dpo": DPOConfig, "ppo": PPOConfig}


def config_of(stage: str) -> type[Section]:
    """The config of a stage.

    Raises:
        UserError: no such stage.
    """
    if stage not in STAGES:
        raise UserError(f"there is no stage {stage!r}", where="--stage", fix=f"name one of {', '.join(STAGES)}")
    return STAGES[stage]


def stage_of_config(config: Section) -> str:
    """The stage that a config is of."""
    return next(stage for stage, kind in STAGES.items() if type(config) is kind)


def stage_of(sections: Collection[str], where: str) -> str:
    """The stage that a file is for: the one that has a section of the file to itself, else the only one that has them all.

    Args:
        sections: top-level keys of the file and of the overrides. A misspelt one tells nothing, and is for the loader to name.
        where: the file.

    Raises:
        UserError: the sections fit several stages, or none.
    """
    fields = {stage: set(kind.model_fields) for stage, kind in STAGES.items()}
    known = set(sections) & set().union(*fields.values())
    owners = {stage for stage in STAGES for name in known if [other for other in STAGES if name in fields[other]] == [stage]}
    fitting = owners or {stage for stage in STAGES if known <= fields[stage]}
    if len(fitting) == 1:
        return fitting.pop()
    may = ", ".join(stage for stage in STAGES if stage in fitting)
    raise UserError(
        f"the file does not tell which stage it is for: its sections ({', '.join(map(str, sections)) or 'none'}) fit {may}",
        where=where,
        fix=f"say --stage {'|'.join(STAGES)}",
    )
