"""What a reward-model report says in a few lines: figures beside what they mean, for the page and for the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_dist.evaluation.interval import MeanInterval
from rlhf_dist.evaluation.judged import RowFates
from rlhf_dist.evaluation.reward_report import RewardReport, SplitFigures


@dataclass(frozen=True)
class Fact:
    """A line of the table at the top: what, how much, what it means; tone: good, bad or plain."""

    name: str
    value: str
    meaning: str
    tone: str = "plain"


def headline(report: RewardReport) -> list[Fact]:
    """The main figures, the most important first."""
    over, ece = report.over_baseline, report.calibration
    ahead = over.low is not None and over.low > 0
    facts = [
        Fact("Accuracy, held out", shown(report.held_out.accuracy), "share of comparisons in which the better answer scores higher"),
        Fact(
            f"Best rule that reads nothing: {report.best_baseline}",
            shown(report.baselines[report.best_baseline]),
            "what the same comparisons give away without a model",
        ),
        Fact(
            "Model − that rule",
            signed(over.mean, over.low, over.high),
            "the model has learned more than the rule" if ahead else "not clearly better than the rule: do not trust this model yet",
            "good" if ahead else "bad",
        ),
    ]
    if report.train and report.gap:
        words = "remembers what it was trained on: overfitting" if report.gap.overfitting else "no sign of overfitting"
        facts.append(Fact("Accuracy, train", shown(report.train.accuracy), "on comparisons that it was trained on"))
        gap = signed(report.gap.mean, report.gap.low, report.gap.high)
        facts.append(Fact("Train − held out", gap, words, "bad" if report.gap.overfitting else "good"))
    loss, scores = report.held_out.log_loss, report.scores
    return [
        *facts,
        Fact("Calibration error (ECE)", f"{ece.ece:.3f}", f"a perfectly calibrated model shows about {ece.ece_by_chance:.3f} by chance"),
        Fact("Log-loss", shown(loss), f"nats a comparison; knowing nothing costs {math.log(2):.3f}", _tone(loss.mean < math.log(2))),
        Fact(
            "Correlation of score and length",
            f"{correlation(report.lengths.pearson)} (rank {correlation(report.lengths.spearman)})",
            "near 0: the model does not pay for length as such",
        ),
        Fact("Score, mean ± deviation", f"{number(scores.mean)} ± {number(scores.std)}", f"over {scores.answers:,} answers"),
    ]


def rows_of_sides(report: RewardReport) -> list[tuple[str, str, RowFates]]:
    """Name, counts in words, and fates of each side of the split."""
    sides = [("held out", report.held_out)] + ([("train", report.train)] if report.train else [])
    return [(name, _counts(side), side.fates) for name, side in sides]


def _counts(side: SplitFigures) -> str:
    parts = [f"{side.pairs:,} comparisons of {side.prompts:,} prompts"]
    parts += [f"{side.ties:,} ties, in no accuracy"] if side.ties else []
    parts += [f"{side.equal_scores:,} with equal scores, which count half"] if side.equal_scores else []
    return ", ".join(parts)


def shown(interval: MeanInterval) -> str:
    """`0.712 [0.690, 0.733]`, or without brackets where one prompt says nothing about others."""
    if interval.low is None or interval.high is None or interval.low == interval.high:
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def signed(mean: float, low: float | None, high: float | None) -> str:
    """A difference with its sign and interval."""
    shown_mean = number(mean, "+")
    return shown_mean if low is None or high is None else f"{shown_mean} [{number(low, '+')}, {number(high, '+')}]"


def correlation(value: float | None) -> str:
    """Signed, with two digits."""
    return number(value, "+.2")


def number(value: float | None, form: str = "") -> str:
    """With a minus sign that is as wide as a plus."""
    return "not defined" if value is None else f"{value:{form if '.' in form else form + '.3'}f}".replace("-", "−")


def _tone(good: bool) -> str:
    return "good" if good else "bad"
