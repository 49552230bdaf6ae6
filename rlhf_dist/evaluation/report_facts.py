"""What a reward-model report says in a few lines: figures beside what they mean, for the page and for the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_dist.evaluation.interval import MeanInterval
from rlhf_dist.evaluation.judged import RowFates, counted
from rlhf_dist.evaluation.reward_report import Gap, RewardReport, SideRows, SplitFigures

FEW_PROMPTS = 30
"""With fewer on a side, a difference that was not found may well be there."""


@dataclass(frozen=True)
class Fact:
    """A line of the table at the top: what, how much, what it means; tone: good, bad or plain."""

    name: str
    value: str
    meaning: str
    tone: str = "plain"


def headline(report: RewardReport) -> list[Fact]:
    """The main figures, the most important first."""
    ece = report.calibration
    facts = [
        Fact("Accuracy, held out", shown(report.held_out.accuracy), "share of comparisons in which the better answer scores higher"),
        Fact(
            f"Best rule that reads nothing: {report.best_baseline}",
            shown(report.baselines[report.best_baseline]),
            "what the same comparisons give away without a model",
        ),
        _over_rule(report.over_baseline),
    ]
    if isinstance(report.train, SplitFigures) and report.gap:
        facts.append(Fact("Accuracy, train", shown(report.train.accuracy), "on comparisons that it was trained on"))
        facts.append(_overfitting(report.gap, min(report.train.accuracy.clusters, report.held_out.accuracy.clusters)))
    elif report.train:
        facts.append(Fact("Accuracy, train", number(None), "none of these comparisons prefers one of its answers"))
    loss, scores = report.held_out.log_loss, report.scores
    return [
        *facts,
        Fact("Calibration error (ECE)", f"{ece.ece:.3f}", f"a perfectly calibrated model shows about {ece.ece_by_chance:.3f} by chance"),
        Fact("Log-loss", shown(loss), f"nats a comparison; knowing nothing costs {math.log(2):.3f}", _loss_tone(loss)),
        Fact(
            "Correlation of score and length",
            f"{correlation(report.lengths.pearson)} (rank {correlation(report.lengths.spearman)})",
            "near 0: the model does not pay for length as such",
        ),
        Fact("Score, mean ± deviation", f"{number(scores.mean)} ± {number(scores.std)}", f"over {counted(scores.answers, 'answer')}"),
    ]


def rows_of_sides(report: RewardReport) -> list[tuple[str, str, RowFates]]:
    """Name, counts in words, and fates of each side of the split."""
    sides = [("held out", report.held_out)] + ([("train", report.train)] if report.train else [])
    return [(name, _counts(side), side.fates) for name, side in sides]


def _over_rule(over: MeanInterval) -> Fact:
    name, value = "Model − that rule", signed(over.mean, over.low, over.high)
    if over.low is not None and over.low > 0:
        return Fact(name, value, "the model has learned more than the rule", "good")
    if over.high is not None and over.high < 0:
        return Fact(name, value, "worse than the rule: do not trust this model", "bad")
    if over.low is None or over.clusters < FEW_PROMPTS:
        return Fact(name, value, f"too few rows to tell ({counted(over.clusters, 'prompt')}): hold out more")
    return Fact(name, value, "not clearly better than the rule: do not trust this model yet", "bad")


def _overfitting(gap: Gap, prompts: int) -> Fact:
    name, value = "Train − held out", signed(gap.mean, gap.low, gap.high)
    if gap.overfitting:
        return Fact(name, value, "remembers what it was trained on: overfitting", "bad")
    if gap.low is None or prompts < FEW_PROMPTS:
        return Fact(name, value, f"too few rows to tell ({counted(prompts, 'prompt')} on one side)")
    return Fact(name, value, "no sign of overfitting", "good")


def _counts(side: SideRows) -> str:
    parts = [f"{counted(side.pairs, 'comparison')} of {counted(side.prompts, 'prompt')}"]
    parts += [f"{counted(side.ties, 'tie')}, in no accuracy"] if side.ties else []
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


def _loss_tone(loss: MeanInterval) -> str:
    """Good or bad where the whole interval lies on one side of knowing nothing."""
    if loss.low is None or loss.high is None:
        return "plain"
    return "good" if loss.high < math.log(2) else "bad" if loss.low > math.log(2) else "plain"
