"""One evaluation on held-out prompts, in numbers: score, its parts, KL, length, how often the policy stops by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import StopReason
from rlhf_dist.evaluation.interval import MeanInterval, clustered_mean
from rlhf_dist.evaluation.proportion import clustered_share, paired_share_difference
from rlhf_dist.runs.rollout_log import REWARD, reward_names

REWARDS = "rewards/"
SHARES = ("stop_rate",)
"""Quantities between 0 and 1: their intervals end there too."""


@dataclass(frozen=True)
class HeldOutSamples:
    """What was measured on each sample; every list has one entry a sample.

    scores: the mixed score, None where no reward gave one. rewards: raw rewards by name, None = abstained.
    lengths: response tokens. stop_reasons: `StopReason`. kl: Σ k1 in nats, None (or entries of None) where not measured.
    """

    prompt_ids: Sequence[int]
    scores: Sequence[float | None]
    rewards: Mapping[str, Sequence[float | None]]
    lengths: Sequence[int]
    stop_reasons: Sequence[int]
    kl: Sequence[float | None] | None = None

    def quantities(self) -> dict[str, list[float | None]]:
        """The measured quantities by name: `score`, `rewards/<name>`, `kl`, `length`, `stop_rate`.

        Raises:
            ValueError: a list of another length.
        """
        named: dict[str, list[float | None]] = {"score": list(self.scores)}
        named |= {REWARDS + name: list(values) for name, values in self.rewards.items()}
        if self.kl is not None:
            named["kl"] = list(self.kl)
        named["length"] = [float(length) for length in self.lengths]
        named["stop_rate"] = [float(reason != StopReason.LENGTH) for reason in self.stop_reasons]
        for name, values in named.items():
            if len(values) != len(self.prompt_ids):
                raise ValueError(f"{name} has {len(values)} values for {len(self.prompt_ids)} samples")
        return named


@dataclass(frozen=True)
class EvaluationResult:
    """Means over held-out prompts, by quantity, with 95 % intervals clustered by prompt.

    missing: how many samples lack a quantity (abstained, not measured); those are in no mean. A quantity nobody has is in no `means`.
    """

    prompts: int
    samples: int
    means: dict[str, MeanInterval]
    missing: dict[str, int] = field(default_factory=dict)

    @property
    def score(self) -> MeanInterval:
        """The mixed score."""
        return self.means["score"]

    def metrics(self) -> dict[str, float]:
        """Flat: `eval/score`, `eval/rewards/<name>`, `eval/kl`, `eval/length`, `eval/stop_rate`.

        Where samples lack a quantity, `eval/missing/<quantity>` says how many.
        """
        means = {f"eval/{name}": interval.mean for name, interval in self.means.items()}
        return means | {f"eval/missing/{name}": float(count) for name, count in self.missing.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: intervals by quantity, those of the raw rewards under `rewards`."""
        plain = {name: mean.to_dict() for name, mean in self.means.items() if not name.startswith(REWARDS)}
        rewards = {name.removeprefix(REWARDS): mean.to_dict() for name, mean in self.means.items() if name.startswith(REWARDS)}
        return {"prompts": self.prompts, "samples": self.samples, **plain, "rewards": rewards, "missing": dict(self.missing)}


def summarise(samples: HeldOutSamples) -> EvaluationResult:
    """Means and intervals of one evaluation.

    Raises:
        UserError: no sample has a score.
        ValueError: lists of different lengths, a value that is not finite.
    """
    means: dict[str, MeanInterval] = {}
    missing: dict[str, int] = {}
    for name, values in samples.quantities().items():
        present = [(value, prompt) for value, prompt in zip(values, samples.prompt_ids, strict=True) if value is not None]
        if present:
            means[name] = (clustered_share if name in SHARES else clustered_mean)(*zip(*present, strict=True))
        if len(present) < len(values):
            missing[name] = len(values) - len(present)
    if "score" not in means:
        raise UserError(
            "no held-out completion has a score",
            where="evaluation",
            fix="give the run held-out prompts, and a reward that does not abstain on all of them",
        )
    return EvaluationResult(len(set(samples.prompt_ids)), len(samples.prompt_ids), means, missing)


def paired_differences(before: HeldOutSamples, after: HeldOutSamples) -> dict[str, MeanInterval]:
    """After minus before for each quantity, over the samples that have it in both, with 95 % intervals clustered by prompt.

    Args:
        before, after: the same samples in the same order.

    Raises:
        ValueError: the prompts differ.
    """
    if list(before.prompt_ids) != list(after.prompt_ids):
        raise ValueError("paired samples must be of the same prompts, in the same order")
    others = after.quantities()
    differences: dict[str, MeanInterval] = {}
    for name, values in before.quantities().items():
        both = [
            (right, left, prompt)
            for left, right, prompt in zip(values, others.get(name, [None] * len(values)), before.prompt_ids, strict=True)
            if left is not None and right is not None
        ]
        if both and name in SHARES:
            differences[name] = paired_share_difference(*zip(*both, strict=True))
        elif both:
            differences[name] = clustered_mean([right - left for right, left, _ in both], [prompt for *_, prompt in both])
    return differences


def samples_from_rollouts(table: pa.Table) -> HeldOutSamples:
    """The samples of a rollout table (`read_rollouts`)."""
    columns = {name: table.column(name).to_pylist() for name in ("prompt_id", "score", "response_tokens", "stop_reason", "kl")}
    measured = any(value is not None for value in columns["kl"])
    return HeldOutSamples(
        prompt_ids=columns["prompt_id"],
        scores=columns["score"],
        rewards={name: table.column(REWARD + name).to_pylist() for name in reward_names(table)},
        lengths=columns["response_tokens"],
        stop_reasons=[StopReason[reason.upper()] for reason in columns["stop_reason"]],
        kl=columns["kl"] if measured else None,
    )
