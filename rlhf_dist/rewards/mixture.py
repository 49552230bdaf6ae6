"""Several rewards into one score a sample: normalise, weight, sum, then length control. Neither abstention nor failure is a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.rewards import FailureRules, RewardSection
from rlhf_dist.contracts.experience import StopReason
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.rewards.length import minimum_length_penalty, missing_stop_score, soft_overlong_penalty
from rlhf_dist.rewards.normalise import NormaliserState, RunningNormaliser

STOP_METRICS = {
    StopReason.STOP_TOKEN: "val/stop_token_rate",
    StopReason.STOP_STRING: "val/stop_string_rate",
    StopReason.LENGTH: "val/length_limit_rate",
}


@dataclass(frozen=True)
class Faults:
    """Failures of a batch by reward name, where there were any.

    failed: rows without a value. defaulted: rows whose value is the configured default. retried, timeouts: calls.
    """

    failed: Mapping[str, Set[int]] = field(default_factory=dict)
    defaulted: Mapping[str, Set[int]] = field(default_factory=dict)
    retried: Mapping[str, int] = field(default_factory=dict)
    timeouts: Mapping[str, int] = field(default_factory=dict)

    @property
    def failed_rows(self) -> frozenset[int]:
        """Rows on which some reward failed."""
        return frozenset(row for rows in self.failed.values() for row in rows)


@dataclass(frozen=True)
class MixedScores:
    """One entry a row.

    scores: the mixed score; NaN where `keep` is False, so that an accidental use shows.
    keep: False for every row of a group in which some sample got no reward at all, or a reward failed on one. Such rows must not be
    trained on.
    tally: `rewards/<name>` mean raw reward where it judged, `rewards/<name>_abstained` share of rows,
    `objective/scores` mean mixed score of kept rows, `rewards/length_control` its part due to length control,
    `rewards/dropped_samples` rows dropped, `rewards/dropped_failed` those of them whose group has a failure, and the shares of stop reasons
    under `val/`. Where the rules of a reward make them possible, also as numbers of rows `rewards/<name>_failed` and
    `rewards/<name>_defaulted`, and as numbers of calls `rewards/<name>_retried` and `rewards/<name>_timeouts`.
    dropped_by_failure: rows of groups in which a reward failed.
    """

    scores: tuple[float, ...]
    keep: tuple[bool, ...]
    tally: Tally
    dropped_by_failure: int = 0


class RewardMixer:
    """Holds the running moments of every reward, so there is one a run, where all ranks' results meet.

    Args:
        section: names, weights, normalisation and clip of the rewards; length control.
        max_new_tokens: the length limit, where the soft over-long penalty is full.
    """

    def __init__(self, section: RewardSection, max_new_tokens: int) -> None:
        self._weights = {source.name: source.weight for source in section.sources}
        self._normalisers = {source.name: RunningNormaliser(source.normalise, source.clip) for source in section.sources}
        self._rules = {source.name: source for source in section.sources if isinstance(source, FailureRules)}
        self._missing_stop = section.missing_stop
        self._soft_overlong = section.soft_overlong
        self._minimum = section.minimum_length
        self._max_new_tokens = max_new_tokens

    @property
    def fallible(self) -> frozenset[str]:
        """Names of the rewards that may fail on a row without stopping the run."""
        return frozenset(name for name, rules in self._rules.items() if rules.counts_failures)

    def mix(
        self,
        results: Mapping[str, Sequence[float | None]],
        response_lengths: Sequence[int],
        stop_reasons: Sequence[int],
        group_size: int,
        *,
        faults: Faults | None = None,
        update: bool = True,
    ) -> MixedScores:
        """Mixes the raw rewards of whole groups.

        Args:
            results: raw values of every configured reward, one a row; None abstains and leaves the others to decide, unless the reward
                failed on the row. A default is mixed as any other raw value, but is no part of means and running moments.
            response_lengths: response tokens, stop token included. stop_reasons: `StopReason` values.
            group_size: samples of a prompt; groups are consecutive runs of rows.
            faults: which rows failed or got a default.
            update: take the batch into the running moments first (training); False leaves them alone (evaluation).

        Raises:
            UserError: a NaN or infinite reward, or no sample left to train on.
            ValueError: rewards missing or unknown, lengths that differ, rows that are not whole groups.
        """
        faults = faults or Faults()
        self._check(results, response_lengths, stop_reasons, group_size)
        if update:
            for name in results:
                self._normalisers[name].update(_judged(results, name, faults))
        mixed = [self._weighted_sum(results, row) for row in range(len(response_lengths))]
        failed = faults.failed_rows
        keep = _whole_groups([score is not None and row not in failed for row, score in enumerate(mixed)], group_size)
        if not any(keep):
            raise _nothing_left(len(keep), faults)
        scores = tuple(
            self._length_control(score, length, reason) if score is not None and kept else math.nan
            for score, length, reason, kept in zip(mixed, response_lengths, stop_reasons, keep, strict=True)
        )
        by_failure = _whole_groups([row not in failed for row in range(len(keep))], group_size).count(False)
        tally = _tally(stop_reasons, mixed, scores, keep)
        tally.merge(self._counted(results, faults, by_failure))
        return MixedScores(scores, keep, tally, by_failure)

    def state_dict(self) -> dict[str, NormaliserState]:
        """The running moments by reward name, ready for JSON."""
        return {name: normaliser.state_dict() for name, normaliser in self._normalisers.items()}

    def load_state_dict(self, state: Mapping[str, NormaliserState]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            UserError: the state is that of other rewards.
        """
        if set(state) != set(self._normalisers):
            raise UserError(
                f"the saved reward moments are of {sorted(state)}, the config has {sorted(self._normalisers)}",
                where="reward.sources",
                fix="resume with the rewards that the run was started with",
            )
        for name, moments in state.items():
            self._normalisers[name].load_state_dict(moments)

    def _weighted_sum(self, results: Mapping[str, Sequence[float | None]], row: int) -> float | None:
        """The mixed score of one row before length control; None when every reward abstains. Summed in the order of the config."""
        judged = [(name, value) for name in self._weights if (value := results[name][row]) is not None]
        return sum(self._weights[name] * self._normalisers[name](value) for name, value in judged) if judged else None

    def _length_control(self, score: float, length: int, stop_reason: int) -> float:
        score = missing_stop_score(score, stop_reason, self._missing_stop.rule, self._missing_stop.value)
        score -= soft_overlong_penalty(length, self._max_new_tokens, self._soft_overlong.buffer, self._soft_overlong.penalty)
        return score - minimum_length_penalty(length, self._minimum.tokens, self._minimum.penalty)

    def _counted(self, results: Mapping[str, Sequence[float | None]], faults: Faults, by_failure: int) -> Tally:
        """Raw rewards and what came instead of them."""
        tally = Tally()
        for name, values in results.items():
            judged = _judged(results, name, faults)
            failed, defaulted = len(faults.failed.get(name, ())), len(faults.defaulted.get(name, ()))
            tally.add(f"rewards/{name}", math.fsum(judged), len(judged))
            tally.add(f"rewards/{name}_abstained", len(values) - len(judged) - failed - defaulted, len(values))
            rules = self._rules.get(name)
            if rules is not None and rules.counts_failures:
                tally.add(f"rewards/{name}_failed" if rules.default is None else f"rewards/{name}_defaulted", failed + defaulted, 1)
                tally.add(f"rewards/{name}_timeouts", faults.timeouts.get(name, 0), 1)
            if rules is not None and rules.retries:
                tally.add(f"rewards/{name}_retried", faults.retried.get(name, 0), 1)
        if any(rules.on_failure == "drop_group" for rules in self._rules.values()):
            tally.add("rewards/dropped_failed", by_failure, 1)
        return tally

    def _check(
        self, results: Mapping[str, Sequence[float | None]], lengths: Sequence[int], reasons: Sequence[int], group_size: int
    ) -> None:
        if set(results) != set(self._weights):
            raise ValueError(f"results of the rewards {sorted(results)} for a mixture of {sorted(self._weights)}")
        rows = len(lengths)
        if not rows or group_size < 1 or rows % group_size:
            raise ValueError(f"{rows} rows are not whole groups of {group_size}")
        wrong = {name: len(values) for name, values in (*results.items(), ("stop_reasons", reasons)) if len(values) != rows}
        if wrong:
            raise ValueError(f"{rows} rows, but {wrong}")
        for name, values in results.items():
            row = next((row for row, value in enumerate(values) if value is not None and not math.isfinite(value)), None)
            if row is not None:
                raise UserError(
                    f"reward {name!r} gave {values[row]} for row {row}: a failure, not a score",
                    where="reward mixture",
                    fix="return None where the reward cannot judge",
                )


def _whole_groups(scored: Sequence[bool], group_size: int) -> tuple[bool, ...]:
    """Keeps a row when every row of its group is scored: the group's baseline would otherwise compare unequal sets."""
    groups = [all(scored[start : start + group_size]) for start in range(0, len(scored), group_size)]
    return tuple(kept for kept in groups for _ in range(group_size))


def _judged(results: Mapping[str, Sequence[float | None]], name: str, faults: Faults) -> list[float]:
    """The values that the reward itself gave."""
    defaulted = faults.defaulted.get(name, ())
    return [value for row, value in enumerate(results[name]) if value is not None and row not in defaulted]


def _nothing_left(rows: int, faults: Faults) -> UserError:
    failed = ", ".join(f"reward {name!r} failed on {len(of_reward)}" for name, of_reward in faults.failed.items() if of_reward)
    if not failed:
        why, fix = "on which every reward abstained", "see why the rewards return None, or add a reward that always judges"
    else:
        why = f"on which a reward failed or every reward abstained: {failed}"
        fix = "quarantine.jsonl in the run folder holds the failed samples with their reasons; mend the reward"
    return UserError(f"all {rows} samples were dropped: every group has a sample {why}", where="reward mixture", fix=fix)


def _tally(stop_reasons: Sequence[int], mixed: Sequence[float | None], scores: Sequence[float], keep: Sequence[bool]) -> Tally:
    tally, rows = Tally(), len(keep)
    kept = [(score, before) for score, before, kept in zip(scores, mixed, keep, strict=True) if kept and before is not None]
    tally.add("objective/scores", math.fsum(score for score, _ in kept), len(kept))
    tally.add("rewards/length_control", math.fsum(score - before for score, before in kept), len(kept))
    tally.add("rewards/dropped_samples", rows - len(kept), 1)
    for reason, metric in STOP_METRICS.items():
        tally.add(metric, sum(given == reason for given in stop_reasons), rows)
    return tally
