"""`run`: how long, how seeded, and where the run leaves its folder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf_dist.config.section import Section


class StageSection(Section):
    """What identifies a run of any stage."""

    name: str = Field(pattern=r"^[\w.-]+$", description="name of the folder under `output_dir`")
    output_dir: str = Field("runs", description="where run folders are made")
    overwrite: bool = Field(False, description="replace an existing run folder of the same name")
    resume: Literal["never", "auto"] = Field(
        "never", description="auto: go on from the newest whole checkpoint of the run folder, or begin where there is none"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="the one seed; sampling, shuffles and head initialisation derive from it")

    @model_validator(mode="after")
    def _one_way(self) -> StageSection:
        if self.overwrite and self.resume == "auto":
            raise ValueError("run.overwrite would remove what run.resume=auto goes on from: set one of them")
        return self


class RunSection(StageSection):
    """What identifies a PPO run."""

    name: str = Field("ppo", pattern=r"^[\w.-]+$", description="name of the folder under `output_dir`")
    steps: int = Field(100, ge=1, description="PPO iterations (generate, score, update)")
