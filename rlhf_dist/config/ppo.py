"""The whole configuration of `rlhf-dist ppo`, and the checks that need several sections."""

from __future__ import annotations

from pydantic import Field, model_validator

from rlhf_dist.config.algorithm import AlgorithmSection
from rlhf_dist.config.data import DataSection
from rlhf_dist.config.engines import PolicySection, ReferenceSection, ValueSection
from rlhf_dist.config.operation import CheckpointSection, EvaluationSection, PlacementSection
from rlhf_dist.config.rewards import RewardSection
from rlhf_dist.config.rollout import RolloutSection
from rlhf_dist.config.run import RunSection
from rlhf_dist.config.section import Section


class PPOConfig(Section):
    """Everything a run is made of; saved, resolved, with the run."""

    run: RunSection = Field(default_factory=RunSection)
    data: DataSection
    policy: PolicySection
    reference: ReferenceSection = Field(default_factory=ReferenceSection)
    value: ValueSection = Field(default_factory=ValueSection)
    reward: RewardSection
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    algorithm: AlgorithmSection = Field(default_factory=AlgorithmSection)
    placement: PlacementSection = Field(default_factory=PlacementSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)

    @model_validator(mode="after")
    def _sections_agree(self) -> PPOConfig:
        samples = self.rollout.prompts_per_step * self.rollout.samples_per_prompt
        if self.algorithm.minibatches > samples:
            raise ValueError(f"algorithm.minibatches is {self.algorithm.minibatches}, but a step has only {samples} completions")
        if self.algorithm.estimator in ("rloo", "grpo") and self.rollout.samples_per_prompt < 2:
            raise ValueError(
                f"algorithm.estimator {self.algorithm.estimator} compares a prompt's samples: rollout.samples_per_prompt must be at least 2"
            )
        # The deepspeed launcher decides the ranks itself; what it decided is checked there.
        if self.placement.launcher == "ray" and self.rollout.prompts_per_step < self.policy.ranks * self.rollout.shards_per_rank:
            raise ValueError(
                "rollout.prompts_per_step is smaller than policy.ranks × rollout.shards_per_rank: some ranks would have nothing to generate"
            )
        if self.reward.soft_overlong.buffer > self.rollout.max_new_tokens:
            raise ValueError("reward.soft_overlong.buffer is larger than rollout.max_new_tokens")
        if self.reward.minimum_length.tokens > self.rollout.max_new_tokens:
            raise ValueError("reward.minimum_length.tokens is larger than rollout.max_new_tokens")
        if self.policy.lora and self.reference.model:
            raise ValueError("policy.lora takes the policy with its adapter off as reference: leave reference.model empty")
        return self

    @property
    def needs_value(self) -> bool:
        """Whether a value engine is started."""
        return self.algorithm.estimator == "gae"

    @property
    def needs_reference(self) -> bool:
        """Whether a reference engine of its own is started."""
        return self.policy.lora is None
