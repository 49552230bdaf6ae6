"""Raw rewards of all ranks into one score a sample. Numbers a sample, so they may meet in the coordinator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_dist.contracts.tally import Tally, merged
from rlhf_dist.coordinator.shards import Shard
from rlhf_dist.rewards.mixture import Faults, RewardMixer

Raw = dict[str, tuple[float | None, ...]]
Fate = Literal["judged", "abstained", "failed", "defaulted"]
"""What became of a row: the reward gave a number, or None; it failed, and the row has no number, or the configured default."""


@dataclass(frozen=True)
class Judged:
    """Scores of all rows in shard order: mixed scores, raw rewards by name, which rows are kept, metrics.

    fates: by name of the rewards that may fail without stopping the run. dropped_by_failure: rows of groups in which one failed.
    """

    scores: tuple[float, ...]
    keep: tuple[bool, ...]
    raw: Raw
    tally: Tally
    fates: dict[str, tuple[Fate, ...]] = field(default_factory=dict)
    dropped_by_failure: int = 0

    def of(self, shards: Sequence[Shard], index: int) -> Judged:
        """The part of one shard."""
        first = sum(shard.rows for shard in shards[:index])
        part = slice(first, first + shards[index].rows)
        raw = {name: values[part] for name, values in self.raw.items()}
        fates = {name: values[part] for name, values in self.fates.items()}
        return Judged(self.scores[part], self.keep[part], raw, Tally(), fates)

    @property
    def genuine(self) -> Raw:
        """The raw rewards that the rewards gave themselves: None in place of defaults."""
        return {
            name: tuple(
                None if fate == "defaulted" else value
                for value, fate in zip(values, self.fates.get(name, ("judged",) * len(values)), strict=True)
            )
            for name, values in self.raw.items()
        }

    def details(self) -> dict[str, list[Any]]:
        """Per-row columns for the rollout log; a dropped row has no score, and a failed one no raw reward."""
        scores = [score if kept else None for score, kept in zip(self.scores, self.keep, strict=True)]
        raw = {f"reward/{name}": list(values) for name, values in self.raw.items()}
        fates = {f"fate/{name}": list(values) for name, values in self.fates.items()}
        return {"score": scores, "kept": list(self.keep), **raw, **fates}


def judge(mixer: RewardMixer, shards: Sequence[Shard], group_size: int, *, update: bool) -> Judged:
    """Puts the ranks' rewards back in row order and mixes them.

    Args:
        mixer: the run's mixture, with its running moments.
        shards: with their rollouts and scores collected.
        group_size: samples of a prompt.
        update: whether the running moments learn from this batch (not in evaluation).
    """
    raw: dict[str, list[float | None]] = {}
    for shard in shards:
        for name, values in raw_rewards(shard).items():
            raw.setdefault(name, []).extend(values)
    lengths = [n for shard in shards if shard.info for n in shard.info.response_lengths]
    reasons = [n for shard in shards if shard.info for n in shard.info.stop_reasons]
    faults = faults_of(shards)
    mixed = mixer.mix(raw, lengths, reasons, group_size, faults=faults, update=update)
    tally = merged([mixed.tally, *(info.tally for shard in shards for info in shard.scores)])
    fates = {name: _fates(values, name, faults) for name, values in raw.items() if name in mixer.fallible}
    return Judged(mixed.scores, mixed.keep, {name: tuple(values) for name, values in raw.items()}, tally, fates, mixed.dropped_by_failure)


def faults_of(shards: Sequence[Shard]) -> Faults:
    """Failures of all ranks, by row over all shards."""
    failed: dict[str, set[int]] = {}
    defaulted: dict[str, set[int]] = {}
    retried: dict[str, int] = {}
    timeouts: dict[str, int] = {}
    first = 0
    for shard in shards:
        for info in shard.scores:
            for result in info.results:
                failed.setdefault(result.name, set()).update(first + info.rows[position] for position in result.failed)
                defaulted.setdefault(result.name, set()).update(first + info.rows[position] for position in result.defaulted)
                retried[result.name] = retried.get(result.name, 0) + result.retried
                timeouts[result.name] = timeouts.get(result.name, 0) + result.timeouts
        first += shard.rows
    return Faults(failed, defaulted, retried, timeouts)


def _fates(values: Sequence[float | None], name: str, faults: Faults) -> tuple[Fate, ...]:
    failed, defaulted = faults.failed.get(name, ()), faults.defaulted.get(name, ())

    def fate(row: int, value: float | None) -> Fate:
        if row in failed:
            return "failed"
        return "defaulted" if row in defaulted else "abstained" if value is None else "judged"

    return tuple(fate(row, value) for row, value in enumerate(values))


def raw_rewards(shard: Shard) -> dict[str, list[float | None]]:
    """One shard's raw rewards by name, in row order.

    Raises:
        ValueError: a row that no rank judged.
    """
    raw: dict[str, dict[int, float | None]] = {}
    for info in shard.scores:
        for result in info.results:
            raw.setdefault(result.name, {}).update(zip(info.rows, result.values, strict=True))
    for name, values in raw.items():
        if len(values) != shard.rows:
            raise ValueError(f"reward {name!r}: {shard.rows - len(values)} of {shard.rows} rows were judged by no rank")
    return {name: [values[row] for row in range(shard.rows)] for name, values in raw.items()}
