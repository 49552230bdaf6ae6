"""Several rewards into one score a sample: normalise, weight, sum, then length control. Abstention is not a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.rewards import RewardSection
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
class MixedScores:
    """One entry a row.

    scores: the mixed score; NaN where `keep` is False, so that an accidental use shows.
    keep: False for every row of a group in which some sample got no reward at all. Such rows must not be trained on.
    tally: `rewards/<name>` mean raw reward where it did not abstain, `rewards/<name>_abstained` share of rows,
    `objective/scores` mean mixed score of kept rows, `rewards/length_control` its part due to length control,
    `rewards/dropped_samples` rows dropped, and the shares of stop reasons under `val/`.
    """

    scores: tuple[float, ...]
    keep: tuple[bool, ...]
    tally: Tally


class RewardMixer:
    """Holds the running moments of every reward, so there is one a run, where all ranks' results meet.

    Args:
        section: names, weights, normalisation and clip of the rewards; length control.
        max_new_tokens: the length limit, where the soft over-long penalty is full.
    """

    def __init__(self, section: RewardSection, max_new_tokens: int) -> None:
        self._weights = {source.name: source.weight for source in section.sources}
        self._normalisers = {source.name: RunningNormaliser(source.normalise, source.clip) for source in section.sources}
        self._missing_stop = section.missing_stop
        self._soft_overlong = section.soft_overlong
        self._minimum = section.minimum_length
        self._max_new_tokens = max_new_tokens

    def mix(
        self,
        results: Mapping[str, Sequence[float | None]],
        response_lengths: Sequence[int],
        stop_reasons: Sequence[int],
        group_size: int,
        *,
        update: bool = True,
    ) -> MixedScores:
        """Mixes the raw rewards of whole groups.

        Args:
            results: raw values of every configured reward, one a row; None abstains and leaves the others to decide.
            response_lengths: response tokens, stop token included. stop_reasons: `StopReason` values.
            group_size: samples of a prompt; groups are consecutive runs of rows.
            update: take the batch into the running moments first (training); False leaves them alone (evaluation).

        Raises:
            UserError: a NaN or infinite reward, or no sample left to train on.
            ValueError: rewards missing or unknown, lengths that differ, rows that are not whole groups.
        """
        self._check(results, response_lengths, stop_reasons, group_size)
        if update:
            for name, values in results.items():
                self._normalisers[name].update(value for value in values if value is not None)
        mixed = [self._weighted_sum(results, row) for row in range(len(response_lengths))]
        keep = _whole_groups([score is not None for score in mixed], group_size)
        if not any(keep):
            raise UserError(
                f"all {len(keep)} samples were dropped: every group has a sample on which every reward abstained",
                where="reward mixture",
                fix="see why the rewards return None, or add a reward that always judges",
            )
        scores = tuple(
            self._length_control(score, length, reason) if score is not None and kept else math.nan
            for score, length, reason, kept in zip(mixed, response_lengths, stop_reasons, keep, strict=True)
        )
        return MixedScores(scores, keep, _tally(results, stop_reasons, mixed, scores, keep))

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


def _tally(
    results: Mapping[str, Sequence[float | None]],
    stop_reasons: Sequence[int],
    mixed: Sequence[float | None],
    scores: Sequence[float],
    keep: Sequence[bool],
) -> Tally:
    tally, rows = Tally(), len(keep)
    for name, values in results.items():
        judged = [value for value in values if value is not None]
        tally.add(f"rewards/{name}", math.fsum(judged), len(judged))
        tally.add(f"rewards/{name}_abstained", rows - len(judged), rows)
    kept = [(score, before) for score, before, kept in zip(scores, mixed, keep, strict=True) if kept and before is not None]
    tally.add("objective/scores", math.fsum(score for score, _ in kept), len(kept))
    tally.add("rewards/length_control", math.fsum(score - before for score, before in kept), len(kept))
    tally.add("rewards/dropped_samples", rows - len(kept), 1)
    for reason, metric in STOP_METRICS.items():
        tally.add(metric, sum(given == reason for given in stop_reasons), rows)
    return tally
