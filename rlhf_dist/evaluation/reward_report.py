"""How good a reward model is, on comparisons it has not seen: accuracy beside what no model would reach, calibration, overfitting, bias to
length. Pure figures; `report_html` draws them.

Accuracy is the share of comparisons in which the better answer has the higher score; equal scores count half, every prompt weighs the
same, and its interval is Wilson's, clustered by prompt (`proportion.clustered_share`: Student's has no width where all are right).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from rlhf_dist.config.errors import UserError
from rlhf_dist.evaluation.calibration import Calibration, calibrate
from rlhf_dist.evaluation.interval import MeanInterval, clustered_mean
from rlhf_dist.evaluation.judged import JudgedPair, PairColumns, RowFates, counted, in_words
from rlhf_dist.evaluation.proportion import clustered_share, paired_share_difference, share_difference

HISTOGRAM_BINS = 30
MAX_POINTS = 2000
LONGER, SHORTER, RANDOM = "longer answer wins", "shorter answer wins", "random"


@dataclass(frozen=True)
class SideRows:
    """What stands on one side of the split: perhaps nothing that a figure could be made of.

    pairs: comparisons, of which `ties` have a label that prefers neither: they are in no accuracy. equal_scores: of the others.
    """

    pairs: int
    ties: int
    equal_scores: int
    prompts: int
    fates: RowFates


@dataclass(frozen=True)
class SplitFigures(SideRows):
    """One side of the split with its figures.

    log_loss: −log σ(r_better − r_worse) in nats, soft labels by their probability, ties included; ln 2 = 0.693 knows nothing.
    """

    accuracy: MeanInterval
    log_loss: MeanInterval


@dataclass(frozen=True)
class Gap:
    """Accuracy on train − accuracy held out, with its 95 % interval; overfitting: the interval lies above 0."""

    mean: float
    low: float | None
    high: float | None
    overfitting: bool


@dataclass(frozen=True)
class Bucket:
    """The accuracy on some of the comparisons."""

    label: str
    accuracy: MeanInterval


@dataclass(frozen=True)
class ScoreFigures:
    """Scores of the held-out answers. An answer that stands in several pairs of its prompt counts once, except in the histogram.

    std is None with a single answer. edges: of the histogram's bins; better, worse: counts in them, without ties.
    """

    answers: int
    mean: float
    std: float | None
    mean_difference: float
    edges: tuple[float, ...]
    better: tuple[int, ...]
    worse: tuple[int, ...]


@dataclass(frozen=True)
class LengthFigures:
    """Score against answer length in tokens, over all held-out answers; a correlation is None where one of the two does not vary.

    points: (tokens, score) of at most 2,000 answers, drawn without regard to either.
    """

    pearson: float | None
    spearman: float | None
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RewardReport:
    """Everything the report shows; figures are held-out unless they say train.

    train: None where no such rows were given; without figures where none of them prefers an answer.
    baselines: accuracy of rules that read nothing, on the same comparisons; `random` is exactly one half.
    best_baseline: the best of them; over_baseline: accuracy of the model − its, paired by comparison, within [−1, 1].
    by_margin: quartiles of the margin; empty where the data tell none, and `without_margin` counts those comparisons.
    by_length: quartiles of the longer answer's tokens. by_length_difference: the better answer much or slightly shorter or longer.
    """

    held_out: SplitFigures
    train: SideRows | None
    gap: Gap | None
    baselines: dict[str, MeanInterval]
    best_baseline: str
    over_baseline: MeanInterval
    calibration: Calibration
    by_source: tuple[Bucket, ...]
    by_margin: tuple[Bucket, ...]
    without_margin: int
    by_length: tuple[Bucket, ...]
    by_length_difference: tuple[Bucket, ...]
    scores: ScoreFigures
    lengths: LengthFigures

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def reward_report(
    held_out: Sequence[JudgedPair],
    train: Sequence[JudgedPair] = (),
    fates: Mapping[str, int] | None = None,
    train_fates: Mapping[str, int] | None = None,
) -> RewardReport:
    """Makes the report.

    Args:
        held_out: comparisons the model was not trained on. train: some that it was; none: no gap.
        fates, train_fates: rows of each that were dropped or cut.

    Raises:
        UserError: no held-out comparison that prefers one of its answers.
        ValueError: scores that are not finite (how many), a label probability outside [0, 1].
    """
    pairs, seen = PairColumns.of(held_out), PairColumns.of(train)
    decided = pairs.select(~pairs.tie_N)
    if not len(decided):
        raise UserError(
            _nothing_held_out(len(pairs), fates), where="reward report", fix="give more rows, with labels that prefer one answer"
        )
    figures = _split(pairs, fates)
    trained = _split(seen, train_fates) if np.any(~seen.tie_N) else None
    rows = _rows(seen, train_fates) if len(seen) or train_fates else None
    rules = _rules(decided)
    prompts, right_N = decided.prompt_N.tolist(), _right(decided.difference_N)
    baselines = {name: clustered_share(values.tolist(), prompts) for name, values in rules.items()}
    baselines[RANDOM] = MeanInterval(0.5, 0.5, 0.5, len(decided), figures.accuracy.clusters)
    best = max(baselines, key=lambda name: (baselines[name].mean, name == RANDOM))
    margins = decided.select(~np.isnan(decided.margin_N))
    return RewardReport(
        held_out=figures,
        train=trained or rows,
        gap=None if trained is None else _gap(trained.accuracy, figures.accuracy),
        baselines=baselines,
        best_baseline=best,
        over_baseline=_over(figures.accuracy, baselines[RANDOM])
        if best == RANDOM
        else paired_share_difference(right_N.tolist(), rules[best].tolist(), prompts),
        calibration=calibrate(pairs),
        by_source=_by_source(decided),
        by_margin=_quartiles(margins, margins.margin_N),
        without_margin=len(decided) - len(margins),
        by_length=_quartiles(decided, np.maximum(decided.better_tokens_N, decided.worse_tokens_N)),
        by_length_difference=_by_length_difference(decided),
        scores=_scores(pairs, decided),
        lengths=_lengths(pairs),
    )


def _right(difference_N: NDArray[Any]) -> NDArray[np.float64]:
    """1 where the difference has the right sign, ½ where there is none."""
    return (np.sign(difference_N) + 1) / 2


def _rules(decided: PairColumns) -> dict[str, NDArray[np.float64]]:
    longer_N = _right(decided.better_tokens_N - decided.worse_tokens_N)
    return {LONGER: longer_N, SHORTER: 1 - longer_N}


def _rows(pairs: PairColumns, fates: Mapping[str, int] | None) -> SideRows:
    decided = pairs.select(~pairs.tie_N)
    ties, equal = len(pairs) - len(decided), int((decided.difference_N == 0).sum())
    return SideRows(len(pairs), ties, equal, len(set(pairs.prompt_N.tolist())), dict(fates or {}))


def _split(pairs: PairColumns, fates: Mapping[str, int] | None) -> SplitFigures:
    loss_N = np.logaddexp(0, -pairs.difference_N) + (1 - pairs.probability_N) * pairs.difference_N
    loss = clustered_mean(loss_N.tolist(), pairs.prompt_N.tolist())
    if loss.low is not None:
        loss = replace(loss, low=max(0.0, loss.low))  # no comparison costs less, whatever Student's interval says of a few
    return SplitFigures(**vars(_rows(pairs, fates)), accuracy=_accuracy(pairs.select(~pairs.tie_N)), log_loss=loss)


def _nothing_held_out(ties: int, fates: Mapping[str, int] | None) -> str:
    if not ties and fates:
        return f"all held-out rows were {in_words(fates)}"
    return f"no held-out comparison prefers one of its answers ({counted(ties, 'tie')})"


def _over(accuracy: MeanInterval, baseline: MeanInterval) -> MeanInterval:
    return MeanInterval(*share_difference(accuracy, baseline), accuracy.n, accuracy.clusters)


def _accuracy(pairs: PairColumns) -> MeanInterval:
    return clustered_share(_right(pairs.difference_N).tolist(), pairs.prompt_N.tolist())


def _gap(train: MeanInterval, held_out: MeanInterval) -> Gap:
    mean, low, high = share_difference(train, held_out)
    return Gap(mean, low, high, overfitting=low is not None and low > 0)


def _buckets(pairs: PairColumns, masks: Iterable[tuple[str, NDArray[np.bool_]]]) -> tuple[Bucket, ...]:
    return tuple(Bucket(label, _accuracy(pairs.select(mask))) for label, mask in masks if mask.any())


def _by_source(pairs: PairColumns) -> tuple[Bucket, ...]:
    sources = np.array(pairs.sources)
    names, counts = np.unique(sources, return_counts=True)
    order = np.lexsort((names, -counts))
    return _buckets(pairs, ((str(names[i]), sources == names[i]) for i in order))


def _quartiles(pairs: PairColumns, values_N: NDArray[Any]) -> tuple[Bucket, ...]:
    """Four buckets of like size, named by their range; fewer where many values are equal."""
    if not len(values_N):
        return ()
    edges = np.unique(np.quantile(values_N, [0.25, 0.5, 0.75]))
    place_N = np.searchsorted(edges, values_N, side="left")
    return _buckets(pairs, ((_range(values_N[place_N == place]), place_N == place) for place in np.unique(place_N)))


def _range(values: NDArray[Any]) -> str:
    low, high = values.min(), values.max()
    return f"{low:.5g}" if low == high else f"{low:.5g} to {high:.5g}"


def _by_length_difference(pairs: PairColumns) -> tuple[Bucket, ...]:
    """Cut at 0, and at the median of the differences on either side: a model that only counts tokens is seen here at once."""
    extra_N = pairs.better_tokens_N - pairs.worse_tokens_N
    if not extra_N.any():
        return _buckets(pairs, [("same length", extra_N == 0)])
    middle = max(1, int(np.median(np.abs(extra_N[extra_N != 0]))))
    return _buckets(
        pairs,
        [
            (f"{middle + 1} or more shorter", extra_N < -middle),
            (f"1 to {middle} shorter", (extra_N < 0) & (extra_N >= -middle)),
            ("same length", extra_N == 0),
            (f"1 to {middle} longer", (extra_N > 0) & (extra_N <= middle)),
            (f"{middle + 1} or more longer", extra_N > middle),
        ],
    )


def _answers(pairs: PairColumns) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Tokens and scores of the answers, each once a prompt, in an order that does not depend on the file's."""
    sides = ((pairs.better_tokens_N, pairs.better_N), (pairs.worse_tokens_N, pairs.worse_N))
    rows = {row for tokens, scores in sides for row in zip(pairs.prompt_N.tolist(), tokens.tolist(), scores.tolist(), strict=True)}
    ordered = sorted(rows)
    return np.array([tokens for _, tokens, _ in ordered], np.int64), np.array([score for _, _, score in ordered], float)


def _scores(pairs: PairColumns, decided: PairColumns) -> ScoreFigures:
    _, scores = _answers(pairs)
    edges = np.histogram_bin_edges(np.concatenate([decided.better_N, decided.worse_N]), HISTOGRAM_BINS)
    better, worse = (np.histogram(side, edges)[0] for side in (decided.better_N, decided.worse_N))
    return ScoreFigures(
        answers=len(scores),
        mean=float(scores.mean()),
        std=float(scores.std(ddof=1)) if len(scores) > 1 else None,
        mean_difference=float(decided.difference_N.mean()),
        edges=tuple(edges.tolist()),
        better=tuple(better.tolist()),
        worse=tuple(worse.tolist()),
    )


def _lengths(pairs: PairColumns) -> LengthFigures:
    tokens, scores = _answers(pairs)
    kept = np.sort(np.random.default_rng(0).permutation(len(scores))[:MAX_POINTS])
    points = tuple(zip(tokens[kept].tolist(), scores[kept].tolist(), strict=True))
    if len(np.unique(tokens)) < 2 or len(np.unique(scores)) < 2:
        return LengthFigures(None, None, points)
    pearson, spearman = scipy.stats.pearsonr(tokens, scores), scipy.stats.spearmanr(tokens, scores)
    return LengthFigures(float(pearson.statistic), float(spearman.statistic), points)
