"""`algorithm`: advantage estimator, clipped losses, KL control, update schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf_dist.config.section import Section


class KlSection(Section):
    """The KL penalty inside the reward (k1 per token)."""

    coef: float = Field(0.05, ge=0, description="β; with `adaptive`, its initial value")
    adaptive: bool = Field(False, description="move β so that KL per sequence approaches `target`")
    target: float = Field(6.0, gt=0, description="KL per sequence the controller aims at, in nats")
    horizon: int = Field(10000, ge=1, description="episodes over which the controller acts")


class ImportanceSection(Section):
    """Truncated importance weights per token, min(π_old / π_sampler, cap): for samples that are not the trainer's own."""

    correction: Literal["none", "truncated"] | None = Field(
        None, description="truncated: weigh each token's policy loss; null: truncated where rollout.max_staleness is 1 or more, else none"
    )
    cap: float = Field(2.0, ge=1, description="largest weight: bounds the variance that a few unlikely tokens bring in")


class AlgorithmSection(Section):
    """PPO and its critic-free relatives."""

    estimator: Literal["gae", "reinforce", "rloo", "grpo"] = Field("gae", description="only `gae` starts a value engine")
    gamma: float = Field(1.0, gt=0, le=1, description="discount")
    lam: float = Field(0.95, ge=0, le=1, description="GAE λ")
    epochs: int = Field(4, ge=1, description="passes over each batch of experience")
    minibatches: int = Field(1, ge=1, description="optimizer steps in one epoch")
    clip_low: float = Field(0.2, gt=0, lt=1, description="ratio clip below 1")
    clip_high: float = Field(0.2, gt=0, description="ratio clip above 1")
    dual_clip: float | None = Field(None, gt=1, description="lower bound of the surrogate for negative advantages")
    value_clip: float | None = Field(0.2, gt=0, description="clip of the value around its old prediction; null: off")
    whiten_advantages: bool | None = Field(None, description="centre and scale advantages over the global batch; null: with `gae` only")
    whiten_rewards: bool = Field(False, description="scale token rewards over the global batch, keeping their mean")
    entropy_coef: float = Field(0.0, ge=0, description="entropy bonus")
    reduction: Literal["token_mean", "sequence_mean", "fixed"] = Field(
        "token_mean",
        description="denominator of the policy loss: valid tokens, sequences (mean of token means), or sequences × max_new_tokens",
    )
    truncated: Literal["terminal", "bootstrap"] = Field(
        "terminal", description="a completion cut by the limit: paid and terminal, or bootstrapped"
    )
    old_logprobs: Literal["recompute", "sampler"] = Field(
        "recompute",
        description="old log-probs by a forward of the trainer, or as the sampler saw them: one forward less; the first minibatch of every "
        "step then measures how far the two are apart, and a run in which that is more than rounding stops",
    )
    importance: ImportanceSection = Field(default_factory=ImportanceSection)
    target_kl_step: float | None = Field(None, gt=0, description="end the update when k2(new, old) exceeds 1.5 × this")
    baseline_momentum: float = Field(0.9, ge=0, lt=1, description="running-mean baseline of `reinforce`")
    kl: KlSection = Field(default_factory=KlSection)

    @model_validator(mode="after")
    def _needs_token_rewards(self) -> AlgorithmSection:
        if self.truncated == "bootstrap" and self.estimator != "gae":
            raise ValueError("truncated: bootstrap needs the value model of estimator: gae")
        if self.whiten_rewards and self.estimator != "gae":
            raise ValueError("whiten_rewards scales the token rewards of estimator: gae; the others have one return a sequence")
        return self

    @model_validator(mode="after")
    def _correction_has_two_policies(self) -> AlgorithmSection:
        if self.importance.correction == "truncated" and self.old_logprobs == "sampler":
            raise ValueError(
                "importance.correction weighs the trainer's old log-probs against the sampler's, and old_logprobs: sampler takes the one "
                "for the other: set old_logprobs: recompute"
            )
        return self

    @property
    def whitens_advantages(self) -> bool:
        """Whether advantages are whitened: by default only those of a critic; group estimators centre (and scale) their own."""
        return self.estimator == "gae" if self.whiten_advantages is None else self.whiten_advantages
