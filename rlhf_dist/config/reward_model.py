"""The whole configuration of `rlhf-dist reward`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf_dist.config.engines import TrainedSection
from rlhf_dist.config.operation import CheckpointSection, PlacementSection
from rlhf_dist.config.run import StageSection
from rlhf_dist.config.section import Section
from rlhf_dist.config.supervised import RowsSection, TrainingSection


class RewardRunSection(StageSection):
    """What identifies the training of a reward model."""

    name: str = Field("reward", pattern=r"^[\w.-]+$", description="name of the folder under `output_dir`")


class ScorerSection(TrainedSection):
    """The model that learns to score."""

    model: str = Field(
        description="Hugging Face folder (or cached hub name): a causal LM, base or SFT, or a peft adapter for one, gets a new head; "
        "a decoder-only sequence classifier with one label keeps its own"
    )


class RewardModelSection(Section):
    """What is learnt of each row."""

    ranking: Literal["plackett_luce", "all_pairs"] = Field(
        "plackett_luce", description="loss of rankings of more than two answers; with two both are Bradley-Terry"
    )
    margins: bool = Field(False, description="the `margin` of a pair is subtracted from its difference of scores (hard labels only)")
    centring: float = Field(
        0.0, ge=0, description="c in c·(2·mean score of a row's answers)², which for a pair is c·(r_c + r_r)²: holds scores near 0"
    )


class RewardModelConfig(Section):
    """Everything that the training of a reward model is made of; saved, resolved, with the run."""

    run: RewardRunSection = Field(default_factory=RewardRunSection)
    data: RowsSection
    model: ScorerSection
    reward_model: RewardModelSection = Field(default_factory=RewardModelSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    placement: PlacementSection = Field(default_factory=PlacementSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
