"""`run`: how long, how seeded, and where the run leaves its folder."""

from __future__ import annotations

from pydantic import Field

from rlhf_dist.config.section import Section


class StageSection(Section):
    """What identifies a run of any stage."""

    name: str = Field(pattern=r"^[\w.-]+$", description="name of the folder under `output_dir`")
    output_dir: str = Field("runs", description="where run folders are made")
    overwrite: bool = Field(False, description="replace an existing run folder of the same name")
    seed: int = Field(0, ge=0, lt=2**63, description="the one seed; sampling, shuffles and head initialisation derive from it")


class RunSection(StageSection):
    """What identifies a PPO run."""

    name: str = Field("ppo", pattern=r"^[\w.-]+$", description="name of the folder under `output_dir`")
    steps: int = Field(100, ge=1, description="PPO iterations (generate, score, update)")
