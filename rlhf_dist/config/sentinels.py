"""`sentinels`: when a run stops because numbers are not finite, and when it warns that it goes wrong."""

from __future__ import annotations

from pydantic import Field

from rlhf_dist.config.section import Section


class SentinelsSection(Section):
    """An optimizer step whose loss or gradient is not finite is skipped on all ranks and written down as a capsule (`rlhf-dist replay`).

    A warning comes when each of the last `patience` steps is beyond a limit, once until as many are back within it.
    """

    max_skipped: int = Field(
        3,
        ge=1,
        description="optimizer steps of one model skipped in a row that stop the run, with its state saved; fp16 overflows do not count",
    )
    capsules: int = Field(
        2, ge=0, description="skipped steps of each model that a run writes down, each with the model's trained weights; 0: none"
    )
    patience: int = Field(3, ge=1, description="steps in a row beyond a limit that make a warning")
    window: int = Field(20, ge=4, description="steps that a limit looks back, before those; half as many must be there")
    kl_limit: float = Field(10.0, gt=0, description="no warning of a KL explosion while objective/kl (nats a sequence) is below this")
    kl_factor: float = Field(3.0, gt=1, description="nor while it is below so many times its median over the window")
    reward_deviations: float = Field(
        6.0, gt=0, description="warn when objective/scores falls so many standard deviations below its median over the window"
    )
    reward_share: float = Field(0.2, ge=0, description="and by this share of that median at least")
    entropy_share: float = Field(
        0.2, gt=0, lt=1, description="warn when the policy's entropy falls below this share of that of the first steps"
    )
    length_factor: float = Field(
        2.0, gt=1, description="warn when responses become so many times as long as those of the first steps, or as short"
    )
