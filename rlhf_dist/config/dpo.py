"""The whole configuration of `rlhf-dist dpo`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf_dist.config.engines import PolicySection
from rlhf_dist.config.operation import CheckpointSection, PlacementSection
from rlhf_dist.config.run import StageSection
from rlhf_dist.config.section import Section
from rlhf_dist.config.supervised import RowsSection, TrainingSection

PreferenceLoss = Literal["sigmoid", "hinge", "ipo", "robust"]


class DPORunSection(StageSection):
    """What identifies a DPO run."""

    name: str = Field("dpo", pattern=r"^[\w.-]+$", description="name of the folder under `output_dir`")


class DPOReferenceSection(Section):
    """The frozen model that log-ratios are measured to. Its log-probs are taken once, before the first step; then it is let go."""

    model: str = Field(
        "",
        description="empty: the model as it is before the first step (with a new adapter: the adapter off); "
        "or a folder, loaded in the precision and with the DeepSpeed file of `model`",
    )


class DPOSection(Section):
    """What is learnt of a pair (NUMERICS §3)."""

    loss: PreferenceLoss = Field("sigmoid", description="sigmoid: DPO, cDPO with label_smoothing; hinge: SLiC; ipo; robust")
    beta: float = Field(0.1, gt=0, description="scale of the log-ratio: the larger, the closer the policy stays to the reference")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="share of labels taken to be wrong (sigmoid, robust); with sigmoid a row that has a probability goes by its own",
    )

    @model_validator(mode="after")
    def _smoothing_fits_the_loss(self) -> DPOSection:
        if self.label_smoothing and self.loss in ("hinge", "ipo"):
            raise ValueError(f"loss {self.loss} knows no label_smoothing: leave it at 0, or use loss=sigmoid or loss=robust")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("loss robust needs the share of wrong labels: set label_smoothing above 0, or use loss=sigmoid")
        return self


class DPOConfig(Section):
    """Everything a DPO run is made of; saved, resolved, with the run."""

    run: DPORunSection = Field(default_factory=DPORunSection)
    data: RowsSection
    model: PolicySection
    reference: DPOReferenceSection = Field(default_factory=DPOReferenceSection)
    dpo: DPOSection = Field(default_factory=DPOSection)
    training: TrainingSection = Field(default_factory=TrainingSection)
    placement: PlacementSection = Field(default_factory=PlacementSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
