"""The whole configuration of `rlhf-dist ppo`, and the checks that need several sections."""

from __future__ import annotations

from pydantic import Field, model_validator

from rlhf_dist.config.algorithm import AlgorithmSection
from rlhf_dist.config.data import DataSection
from rlhf_dist.config.engines import PolicySection, ReferenceSection, ValueSection
from rlhf_dist.config.operation import CheckpointSection, EvaluationSection, PPOPlacementSection
from rlhf_dist.config.rewards import RewardSection
from rlhf_dist.config.rollout import RolloutSection
from rlhf_dist.config.run import RunSection
from rlhf_dist.config.section import Section
from rlhf_dist.config.sentinels import SentinelsSection


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
    placement: PPOPlacementSection = Field(default_factory=PPOPlacementSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    sentinels: SentinelsSection = Field(default_factory=SentinelsSection)

    @model_validator(mode="after")
    def _sections_agree(self) -> PPOConfig:
        samples = self.rollout.prompts_per_step * self.rollout.samples_per_prompt
        if self.algorithm.minibatches > samples:
            raise ValueError(f"algorithm.minibatches is {self.algorithm.minibatches}, but a step has only {samples} completions")
        if self.algorithm.estimator in ("rloo", "grpo") and self.rollout.samples_per_prompt < 2:
            raise ValueError(
                f"algorithm.estimator {self.algorithm.estimator} compares a prompt's samples: rollout.samples_per_prompt must be at least 2"
            )
        if self.rollout.ranks and self.placement.launcher != "ray":
            raise ValueError("rollout.ranks starts actors, which needs Ray: set placement.launcher=ray, or rollout.ranks=0")
        # The deepspeed launcher decides the ranks itself; what it decided is checked there.
        sampler = "rollout" if self.rollout.ranks else "policy"
        ranks = self.rollout.ranks or self.policy.ranks
        if self.placement.launcher == "ray" and self.rollout.prompts_per_step < ranks * self.rollout.shards_per_rank:
            raise ValueError(
                f"rollout.prompts_per_step is smaller than {sampler}.ranks × rollout.shards_per_rank: "
                "some ranks would have nothing to generate"
            )
        if self.rollout.max_staleness and self.algorithm.old_logprobs == "sampler":
            raise ValueError(
                "algorithm.old_logprobs: sampler takes the sampler's log-probs for those of the policy that trains, and with "
                f"rollout.max_staleness {self.rollout.max_staleness} they are an older policy's: set algorithm.old_logprobs: recompute"
            )
        if self.rollout.max_staleness and self.placement.offload == "idle":
            raise ValueError(
                f"rollout.max_staleness {self.rollout.max_staleness} samples while the engines train, and placement.offload: idle lets one "
                "engine work at a time: set one of the two back (max_staleness: 0, or offload: none)"
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

    @property
    def importance_cap(self) -> float | None:
        """The largest importance weight of a token; None: tokens are not weighted. Unless the config says, only stale samples are."""
        chosen = self.algorithm.importance.correction
        corrects = self.rollout.max_staleness > 0 if chosen is None else chosen == "truncated"
        return self.algorithm.importance.cap if corrects else None
