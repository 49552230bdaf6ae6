"""`*.optim`: AdamW and the learning-rate schedule of one trained model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf_dist.config.section import Section


class OptimSection(Section):
    """AdamW; the schedule counts optimizer steps."""

    lr: float = Field(1e-6, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW betas")
    eps: float = Field(1e-5, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    warmup_steps: int = Field(0, ge=0, description="optimizer steps of linear warm-up")
    schedule: Literal["linear", "constant"] = Field("linear", description="linear decay to 0 over the run, or constant after warm-up")
    clip_norm: float = Field(1.0, ge=0, description="gradient-norm clip; 0 switches it off")
