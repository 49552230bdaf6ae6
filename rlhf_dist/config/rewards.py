"""`reward`: where scores come from, how they are mixed, and length control against reward hacking."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, field_validator, model_validator

from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.section import Section

Normalise = Literal["none", "scale", "standardise"]
OnFailure = Literal["raise", "retry", "drop_group", "default"]


class _Source(Section):
    name: str = Field(pattern=r"^\w+$", description="name in metrics, rollouts and summary")
    weight: float = Field(1.0, description="weight in the sum")
    normalise: Normalise = Field("none", description="divide by (scale), or also centre on (standardise), the running moments")
    clip: float | None = Field(None, gt=0, description="clip the normalised reward to ± this")


class FailureRules(_Source):
    """What happens when a reward fails: it raises, takes too long, dies, answers with the wrong shape, or with NaN for a row."""

    timeout_s: float = Field(60.0, gt=0, description="longest a call may take (HTTP: a request); then it is ended, and counts as failed")
    on_failure: OnFailure = Field(
        "raise",
        description="raise: stop the run; retry: try `retries` times more, then stop; drop_group: leave out its whole group, counted; "
        "default: give the row the raw reward `default`, counted",
    )
    retries: int = Field(0, ge=0, description="how often to try again first; needed by retry, allowed with drop_group and default")
    default: float | None = Field(
        None, allow_inf_nan=False, description="the raw reward of a row that failed; only with on_failure: default"
    )

    @model_validator(mode="after")
    def _every_rule_counts(self) -> FailureRules:
        if self.on_failure == "raise" and self.retries:
            raise ValueError(f"retries={self.retries} does nothing with on_failure=raise: set on_failure=retry, or retries=0")
        if self.on_failure == "retry" and not self.retries:
            raise ValueError("on_failure=retry says nothing without retries: set retries=1 or more")
        if self.on_failure == "default" and self.default is None:
            raise ValueError("on_failure=default needs a value: set default, the raw reward of a row that failed")
        if self.on_failure != "default" and self.default is not None:
            raise ValueError(
                f"default={self.default} does nothing with on_failure={self.on_failure}: leave it out, or set on_failure=default"
            )
        return self

    @property
    def counts_failures(self) -> bool:
        """Whether the run goes on when a row fails."""
        return self.on_failure in ("drop_group", "default")


class FunctionReward(FailureRules):
    """`def reward(prompts, completions, **columns) -> list[float | None]` in a process of its own; None abstains."""

    kind: Literal["function"]
    path: str = Field(description="`package.module:function` or `file.py:function`")
    start_timeout_s: float = Field(300.0, gt=0, description="longest that importing the function's module may take")


class HttpReward(FailureRules):
    """An endpoint that judges rows sent to it as JSON (README, "Your reward"). By default a request is tried three times more."""

    kind: Literal["http"]
    url: str = Field(description="address that takes POST requests, http:// or https://")
    on_failure: OnFailure = Field(
        "retry",
        description="raise: stop the run; retry: send the request `retries` times more, then stop; drop_group: leave out the groups of the "
        "request's rows, counted; default: give those rows the raw reward `default`, counted",
    )
    retries: int = Field(3, ge=0, description="how often to send a request again, with growing pauses; 0 with on_failure: raise")
    batch_size: int = Field(16, ge=1, description="rows of one request; they fail together when the request fails")
    concurrency: int = Field(4, ge=1, description="requests on the way at a time, of each reward rank")
    auth_env: str | None = Field(
        None,
        pattern=r"^[A-Za-z_]\w*$",
        description="environment variable with the token that is sent as `Authorization: Bearer …`; needed on the reward ranks' machines",
    )

    @field_validator("url")
    @classmethod
    def _plain_address(cls, url: str) -> str:
        if not url.isprintable() or " " in url:  # urlsplit leaves some out in silence
            raise ValueError("url holds a space or a character that cannot be printed: leave it out, or write it as %20 and the like")
        try:
            parts = urlsplit(url)
        except ValueError:  # its message may quote a password
            raise ValueError("url names a host that cannot be read: see its brackets and characters") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url must begin with http:// or https:// and name a host")
        if parts.username is not None or parts.password is not None:
            raise ValueError(
                "url holds a user name or password, which configs must not: put a token into the environment and name it in auth_env"
            )
        if parts.fragment:
            raise ValueError("url has a fragment (#…), which is never sent: leave it out")
        if not _is_port(parts) or not _is_host(parts.hostname):
            raise ValueError("url names a host or port that cannot be: a port is 1 to 65535, a part of a host's name 1 to 63 characters")
        return url


def _is_port(parts: SplitResult) -> bool:
    try:
        return parts.port is None or parts.port > 0
    except ValueError:
        return False


def _is_host(name: str) -> bool:
    try:
        return bool(name.encode("idna"))
    except UnicodeError:
        return False


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


Source = Annotated[FunctionReward | ModelReward | HttpReward, Field(discriminator="kind")]


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
