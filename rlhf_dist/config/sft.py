"""The whole configuration of `rlhf-dist sft`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf_dist.config.engines import PolicySection
from rlhf_dist.config.operation import CheckpointSection, PlacementSection
from rlhf_dist.config.run import StageSection
from rlhf_dist.config.section import Section
from rlhf_dist.config.supervised import RowsSection, TrainingSection


class SftRunSection(StageSection):
    """What identifies an SFT run."""

    name: str = Field("sft", pattern=r"^[\w.-]+$", description="name of the folder under `output_dir`")


class SftSection(Section):
    """What is learnt of each row."""

    loss_on: Literal["completion", "all"] = Field("completion", description="tokens that are trained on: the assistant's alone, or all")


class SFTConfig(Section):
    """Everything an SFT run is made of; saved, resolved, with the run."""

    run: SftRunSection = Field(default_factory=SftRunSection)
    data: RowsSection
    model: PolicySection
    sft: SftSection = Field(default_factory=SftSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    placement: PlacementSection = Field(default_factory=PlacementSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
