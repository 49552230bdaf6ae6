"""`reward`: where scores come from, how they are mixed, and length control against reward hacking."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.section import Section

Normalise = Literal["none", "scale", "standardise"]


class _Source(Section):
    name: str = Field(pattern=r"^\w+$", description="name in metrics, rollouts and summary")
    weight: float = Field(1.0, description="weight in the sum")
    normalise: Normalise = Field("none", description="divide by (scale), or also centre on (standardise), the running moments")
    clip: float | None = Field(None, gt=0, description="clip the normalised reward to ± this")


class FunctionReward(_Source):
    """`def reward(prompts, completions, **columns) -> list[float | None]`; None abstains."""

    kind: Literal["function"]
    path: str = Field(description="`package.module:function` or `file.py:function`")


class ModelReward(_Source):
    """A Hugging Face sequence classifier on its own engine, with its own tokenizer and pooling."""

    kind: Literal["model"]
    model: str = Field(description="Hugging Face folder of a sequence classifier")
    label: int | None = Field(None, ge=0, description="which output to read; needed when the model has several")
    transform: Literal["logit", "probability", "log_odds"] | None = Field(
        None, description="what to make of it; needed when the model has several"
    )
    max_tokens: int | None = Field(None, ge=1, description="longest input; default: the model's context")
    overlong: Literal["error", "truncate_left"] = Field("error", description="what to do with a longer input; truncations are counted")


Source = Annotated[FunctionReward | ModelReward, Field(discriminator="kind")]


class MissingStop(Section):
    """What a completion without a stop token pays."""

    rule: Literal["none", "subtract", "replace"] = Field(
        "none", description="leave the score, subtract `value` from it, or replace it by `value`"
    )
    value: float = Field(1.0, description="the amount subtracted, or the score put in its place")


class SoftOverlong(Section):
    """A penalty that grows linearly over the last `buffer` tokens before `max_new_tokens`."""

    buffer: int = Field(0, ge=0, description="tokens before the limit at which the penalty starts; 0 switches it off")
    penalty: float = Field(1.0, ge=0, description="penalty at the limit")


class MinimumLength(Section):
    """A fixed penalty for completions shorter than `tokens`."""

    tokens: int = Field(0, ge=0, description="shortest completion that pays nothing; 0 switches it off")
    penalty: float = Field(1.0, ge=0, description="amount subtracted from the score")


class RewardSection(EngineSection):
    """All rewards of a run. Model rewards share the ranks, each on an engine of its own."""

    sources: list[Source] = Field(min_length=1, description="rewards, summed by weight")
    missing_stop: MissingStop = Field(default_factory=MissingStop)
    soft_overlong: SoftOverlong = Field(default_factory=SoftOverlong)
    minimum_length: MinimumLength = Field(default_factory=MinimumLength)

    @model_validator(mode="after")
    def _names_differ(self) -> RewardSection:
        names = [source.name for source in self.sources]
        doubles = sorted({name for name in names if names.count(name) > 1})
        if doubles:
            raise ValueError(f"two rewards are called {doubles[0]!r}; names must differ")
        return self
