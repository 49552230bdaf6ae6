"""Before and after training on the same held-out prompts with the same random numbers: paired figures, and samples to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from rlhf_dist.config.errors import UserError
from rlhf_dist.evaluation.held_out import EvaluationResult, HeldOutSamples, paired_differences, samples_from_rollouts, summarise
from rlhf_dist.evaluation.interval import MeanInterval
from rlhf_dist.runs.rollout_log import read_rollouts

Key = tuple[int, int]


@dataclass(frozen=True)
class Pair:
    """One sample before and after: same prompt, same sample index. Scores are None where no reward gave one."""

    prompt_id: int
    sample_index: int
    prompt: str
    before: str
    after: str
    score_before: float | None
    score_after: float | None

    @property
    def gain(self) -> float | None:
        """Score after minus score before."""
        return None if self.score_before is None or self.score_after is None else self.score_after - self.score_before


@dataclass(frozen=True)
class Comparison:
    """Two evaluations side by side.

    before, after: each over all of its samples. differences: after minus before over pairs, by quantity, clustered by prompt.
    unpaired: samples that stand in one file only; they are in no difference.
    """

    before: EvaluationResult
    after: EvaluationResult
    differences: dict[str, MeanInterval]
    pairs: tuple[Pair, ...]
    unpaired: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able figures, without the samples."""
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "difference": {name: interval.to_dict() for name, interval in self.differences.items()},
            "pairs": len(self.pairs),
            "unpaired": self.unpaired,
        }


@dataclass(frozen=True)
class Example:
    """A pair chosen for reading, and why it was chosen."""

    reason: str
    pair: Pair

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"reason": self.reason, **asdict(self.pair), "gain": self.pair.gain}


def compare(before: Path, after: Path) -> Comparison:
    """Compares two evaluation files of a run, pair by pair.

    Raises:
        UserError: an unreadable file, a sample that stands twice in one, no sample in both, one prompt id with two texts, no scores.
    """
    tables = [read_rollouts(path) for path in (before, after)]
    rows = [_rows_by_key(table, path) for table, path in zip(tables, (before, after), strict=True)]
    keys = [key for key in rows[0] if key in rows[1]]
    if not keys:
        raise UserError(
            "the two evaluations share no sample", where=f"{before} and {after}", fix="compare evaluations of the same held-out prompts"
        )
    samples = [samples_from_rollouts(table) for table in tables]
    pairs = tuple(_pair(tables[0], rows[0][key], tables[1], rows[1][key], after) for key in keys)
    return Comparison(
        before=summarise(samples[0]),
        after=summarise(samples[1]),
        differences=paired_differences(*(_selected(part, [index[key] for key in keys]) for part, index in zip(samples, rows, strict=True))),
        pairs=pairs,
        unpaired=len(rows[0]) + len(rows[1]) - 2 * len(keys),
    )


QUANTILES = ((1.0, "largest gain"), (0.0, "smallest gain"), (0.5, "median"), (0.75, "upper quartile"), (0.25, "lower quartile"))
"""In the order in which they claim a prompt, for when there are fewer than five."""


def representative(comparison: Comparison) -> list[Example]:
    """At most five pairs that show the whole range of change, best first: the same every time, nothing picked by hand.

    Of each prompt only the first sample with both scores competes; prompts are ranked by the change of its score (then by prompt id), and
    the extremes, the median and the quartiles are taken. No prompt stands twice.
    """
    first: dict[int, tuple[float, Pair]] = {}
    for pair in sorted(comparison.pairs, key=lambda p: (p.prompt_id, p.sample_index)):
        if pair.gain is not None:
            first.setdefault(pair.prompt_id, (pair.gain, pair))
    ranked = [pair for _, pair in sorted(first.values(), key=lambda entry: entry[0])]  # stable: ties stay in order of prompt id
    chosen: dict[int, str] = {}
    for quantile, reason in QUANTILES if ranked else ():
        chosen.setdefault(round(quantile * (len(ranked) - 1)), reason)
    return [Example(reason, ranked[rank]) for rank, reason in sorted(chosen.items(), reverse=True)]


def _rows_by_key(table: pa.Table, path: Path) -> dict[Key, int]:
    keys = list(zip(table.column("prompt_id").to_pylist(), table.column("sample_index").to_pylist(), strict=True))
    rows = {key: row for row, key in enumerate(keys)}
    if len(rows) != len(keys):
        raise UserError(f"{len(keys) - len(rows)} samples stand twice in the file", where=str(path), fix="pass the file of one evaluation")
    return rows


def _pair(before: pa.Table, row: int, after: pa.Table, other: int, where: Path) -> Pair:
    def cell(table: pa.Table, name: str, index: int) -> Any:
        return table.column(name)[index].as_py()

    prompt = cell(before, "prompt", row)
    if cell(after, "prompt", other) != prompt:
        raise UserError(
            f"prompt {cell(before, 'prompt_id', row)} has another text than before",
            where=f"{where}, row {other}",
            fix="compare evaluations of the same held-out prompts",
        )
    return Pair(
        prompt_id=cell(before, "prompt_id", row),
        sample_index=cell(before, "sample_index", row),
        prompt=prompt,
        before=cell(before, "completion", row),
        after=cell(after, "completion", other),
        score_before=cell(before, "score", row),
        score_after=cell(after, "score", other),
    )


def _selected(samples: HeldOutSamples, rows: list[int]) -> HeldOutSamples:
    def take(values: Sequence[Any]) -> list[Any]:
        return [values[row] for row in rows]

    return HeldOutSamples(
        prompt_ids=take(samples.prompt_ids),
        scores=take(samples.scores),
        rewards={name: take(values) for name, values in samples.rewards.items()},
        lengths=take(samples.lengths),
        stop_reasons=take(samples.stop_reasons),
        kl=None if samples.kl is None else take(samples.kl),
    )
