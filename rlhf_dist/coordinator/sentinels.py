"""Sentinels: how many steps in a row were skipped because something was not finite, and detectors that warn of a run that goes wrong.

A detector compares the last `patience` steps with limits made of the steps before them. It warns when all of them are beyond, and is then
silent until as many are back within. What they remember is saved with the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.sentinels import SentinelsSection
from rlhf_dist.contracts.roles import NOT_WRITTEN
from rlhf_dist.coordinator.update import UpdateReport

FIRST = 10
"""Steps whose median is how the run began."""


@dataclass(frozen=True)
class Limits:
    """What is still well, and in words where that comes from."""

    low: float = -math.inf
    high: float = math.inf
    words: str = ""


Setter = Callable[[SentinelsSection, float, Sequence[float]], Limits]
"""(settings, median of the first steps, steps of the window) → limits; none where the window is too short for any."""


@dataclass(frozen=True)
class Detector:
    """name: in the message. metric: watched. limits: see `Setter`. causes: likely ones, and what to do."""

    name: str
    metric: str
    limits: Setter
    causes: str


def median(values: Sequence[float]) -> float:
    """The middle one, or the mean of the two in the middle."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _kl(section: SentinelsSection, first: float, before: Sequence[float]) -> Limits:
    """It grows from 0 at first, whatever the run, so that a multiple says nothing before there is a window."""
    usual, floor, words = median(before), section.kl_limit, "sentinels.kl_limit"
    if len(before) < section.window // 2:
        floor, words = section.kl_factor * floor, f"{section.kl_factor:g} × sentinels.kl_limit"
    if section.kl_factor * usual < floor:
        return Limits(high=floor, words=words)
    return Limits(high=section.kl_factor * usual, words=f"{section.kl_factor:g} × the median of the {len(before)} before, {usual:.4g}")


def _reward(section: SentinelsSection, first: float, before: Sequence[float]) -> Limits:
    if len(before) < section.window // 2:
        return Limits()
    usual, mean = median(before), sum(before) / len(before)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in before) / (len(before) - 1))
    drop = max(section.reward_deviations * deviation, section.reward_share * abs(usual))
    return Limits(low=usual - drop, words=f"the median of the {len(before)} steps before, {usual:.4g} ± {deviation:.2g}, less {drop:.4g}")


def _entropy(section: SentinelsSection, first: float, before: Sequence[float]) -> Limits:
    return Limits(low=section.entropy_share * first, words=f"{section.entropy_share:g} × that of the first steps, {first:.4g}")


def _length(section: SentinelsSection, first: float, before: Sequence[float]) -> Limits:
    words = f"those of the first steps, {first:.4g}, × or ÷ {section.length_factor:g}"
    return Limits(first / section.length_factor, first * section.length_factor, words)


DETECTORS = (
    Detector(
        "KL explosion",
        "objective/kl",
        _kl,
        "the learning rate is too high, the penalty too small, or the policy exploits the reward: read the last rollouts; "
        "lower policy.optim.lr, raise algorithm.kl.coef, or set algorithm.target_kl_step",
    ),
    Detector(
        "reward collapse",
        "objective/scores",
        _reward,
        "the policy has left the text that the reward knows (see KL and length), the value model has diverged (see loss/value_avg), or the "
        "reward itself or the prompts have changed: read the last rollouts; go back to an earlier checkpoint with a lower policy.optim.lr",
    ),
    Detector(
        "entropy collapse",
        "policy/entropy_avg",
        _entropy,
        "the policy says nearly the same whatever is asked: the reward is exploited, the learning rate too high, or the penalty too small: "
        "raise algorithm.entropy_coef or algorithm.kl.coef, lower policy.optim.lr, or sample at a higher rollout.temperature",
    ),
    Detector(
        "length drift",
        "val/response_length",
        _length,
        "the reward pays for length or brevity, or completions no longer end in a stop token: compare rewards and lengths in the rollouts; "
        "set reward.soft_overlong or reward.minimum_length",
    ),
)


@dataclass
class Memory:
    """What a detector remembers of its metric.

    first: how it began. last: the window and the steps under suspicion, oldest first. alarmed: a warning was given, and is not over.
    """

    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    alarmed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, copied."""
        return {"first": list(self.first), "last": list(self.last), "alarmed": self.alarmed}

    def take(self, detector: Detector, section: SentinelsSection, value: float) -> list[str]:
        """The value of one more step; a warning, or none."""
        if len(self.first) < FIRST:
            self.first.append(value)
        self.last = [*self.last, value][-section.window - section.patience :]
        suspects, before = self.last[-section.patience :], self.last[: -section.patience]
        if not before:
            return []
        limits = detector.limits(section, median(self.first), before)
        well = [limits.low <= suspect <= limits.high for suspect in suspects]
        if self.alarmed or any(well):
            self.alarmed = self.alarmed and not all(well)
            return []
        self.alarmed = True
        return [_warning(detector, suspects, limits)]


def _warning(detector: Detector, suspects: Sequence[float], limits: Limits) -> str:
    beyond, limit = ("above", limits.high) if suspects[-1] > limits.high else ("below", limits.low)
    seen = ", ".join(f"{value:.4g}" for value in suspects)
    what = f"{detector.metric} was {seen} in the last {len(suspects)} steps, {beyond} {limit:.4g} ({limits.words})"
    return f"warning: {detector.name}: {what}. Likely causes: {detector.causes}"


class Sentinels:
    """Watches a run.

    Args:
        section: limits.
        memory: of `state_dict`; empty for a run that begins.
    """

    def __init__(self, section: SentinelsSection, memory: Mapping[str, Any] | None = None) -> None:
        held: Mapping[str, Any] = memory or {}
        self._section = section
        self._row: dict[str, int] = dict(held.get("row", {}))
        self._capsules: dict[str, int] = dict(held.get("capsules", {}))
        self._warnings: int = held.get("warnings", 0)
        self._memories = {d.metric: Memory(**held.get("metrics", {}).get(d.metric, {})) for d in DETECTORS}
        self._skipped = 0
        self._written: list[str] = []
        self._spent = ""

    def state_dict(self) -> dict[str, Any]:
        """What must not be lost, as JSON-able values."""
        metrics = {metric: memory.to_dict() for metric, memory in self._memories.items()}
        return {"row": dict(self._row), "capsules": dict(self._capsules), "warnings": self._warnings, "metrics": metrics}

    def capsules_left(self) -> dict[str, int]:
        """How many skipped steps of each model may still be written down."""
        return {name: max(self._section.capsules - self._capsules.get(name, 0), 0) for name in ("policy", "value")}

    def note(self, step: int, report: UpdateReport) -> list[str]:
        """Counts what an update skipped; returns what there is to say of it. step: PPO steps done, with this one."""
        self._skipped, said = 0, []
        for name, faults in report.faults.items():
            skipped = [number for number, fault in enumerate(faults, start=1) if fault]
            self._skipped += len(skipped)
            for fault in faults:
                self._row[name] = self._row.get(name, 0) + 1 if fault else 0
                if self._row[name] >= self._section.max_skipped:
                    self._spent = (
                        f"{self._row[name]} optimizer steps of the {name} in a row were skipped, because the {fault} was not finite"
                    )
            if skipped:
                kinds = " and ".join(sorted({f"the {fault}" for fault in faults if fault}))
                numbers = ", ".join(map(str, skipped))
                said.append(f"step {step}: optimizer steps {numbers} of {len(faults)} of the {name} skipped: {kinds} was not finite")
        for name, written in report.capsules:
            self._capsules[name] = self._capsules.get(name, 0) + 1
            self._written += [] if written.startswith(NOT_WRITTEN) else [written]
            said.append(f"capsule: {written}")
        return said

    def watch(self, metrics: Mapping[str, float]) -> list[str]:
        """Takes in the metrics of a step, those of `note` included; returns the new warnings. One that is absent says nothing."""
        new = []
        for detector in DETECTORS:
            if detector.metric in metrics:
                new += self._memories[detector.metric].take(detector, self._section, float(metrics[detector.metric]))
        self._warnings += len(new)
        return new

    def metrics(self) -> dict[str, float]:
        """`sentinels/skipped_steps` of the last update, `sentinels/warnings` of the run so far."""
        return {"sentinels/skipped_steps": float(self._skipped), "sentinels/warnings": float(self._warnings)}

    def spent(self, step: int) -> UserError | None:
        """Why the run must stop, once too many steps in a row were skipped; the row then begins anew, for a run that is resumed."""
        if not self._spent:
            return None
        seen = f"`rlhf-dist replay {self._written[-1]}` shows which samples; " if self._written else ""
        fix = (
            f"{seen}the state is saved: raise sentinels.max_skipped and go on with run.resume=auto, or mend the cause (a reward, a prompt, "
            "the learning rate) and begin anew"
        )
        error = UserError(self._spent, where=f"step {step} (sentinels.max_skipped {self._section.max_skipped})", fix=fix)
        self._spent, self._row = "", {}
        return error
