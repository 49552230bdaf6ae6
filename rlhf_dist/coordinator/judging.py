"""Raw rewards of all ranks into one score a sample. Numbers a sample, so they may meet in the coordinator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_dist.contracts.tally import Tally, merged
from rlhf_dist.coordinator.shards import Shard
from rlhf_dist.rewards.mixture import RewardMixer

Raw = dict[str, tuple[float | None, ...]]


@dataclass(frozen=True)
class Judged:
    """Scores of all rows in shard order: mixed scores, raw rewards by name, which rows are kept, metrics."""

    scores: tuple[float, ...]
    keep: tuple[bool, ...]
    raw: Raw
    tally: Tally

    def of(self, shards: Sequence[Shard], index: int) -> Judged:
        """The part of one shard."""
        first = sum(shard.rows for shard in shards[:index])
        part = slice(first, first + shards[index].rows)
        return Judged(self.scores[part], self.keep[part], {name: values[part] for name, values in self.raw.items()}, Tally())

    def details(self) -> dict[str, list[Any]]:
        """Per-row columns for the rollout log; a dropped row has no score."""
        scores = [score if kept else None for score, kept in zip(self.scores, self.keep, strict=True)]
        raw = {f"reward/{name}": list(values) for name, values in self.raw.items()}
        return {"score": scores, "kept": list(self.keep), **raw}


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
    mixed = mixer.mix(raw, lengths, reasons, group_size, update=update)
    tally = merged([mixed.tally, *(info.tally for shard in shards for info in shard.scores)])
    return Judged(mixed.scores, mixed.keep, {name: tuple(values) for name, values in raw.items()}, tally)


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
