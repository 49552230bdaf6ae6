"""Training a reward model as a stage of the supervised loop: the best model by held-out loss, and a report at the end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf_dist.contracts.supervised import RewardModelRole, Side
from rlhf_dist.evaluation.judged import JudgedPair, in_words
from rlhf_dist.evaluation.report_facts import headline, rows_of_sides
from rlhf_dist.evaluation.reward_report import RewardReport, SplitFigures, reward_report
from rlhf_dist.training.supervised import Setting, Stage

TRAIN_SAMPLE, SAMPLE_SEED = 2000, 0
NO_HELD_OUT = "there are no held-out rows: set data.eval or data.eval_fraction (a small share of few rows may hold out none)"


def report(setting: Setting) -> dict[str, Any]:
    """Has the held-out rows, and a sample of the training rows, judged by the model as it is now, and writes the report.

    Returns:
        For the summary: `report` with its main figures, or with the reason why there is none.
    """
    facts = setting.facts
    if not facts.eval_lengths:
        why = f"all held-out rows were {in_words(facts.eval_fates)}" if facts.eval_fates else NO_HELD_OUT
        return {"report": {"none": why}}
    held_out = _judged(setting, "eval", range(len(facts.eval_lengths)), facts.eval_lengths)
    trained = range(len(facts.lengths))
    train = _judged(setting, "train", random.Random(SAMPLE_SEED).sample(trained, min(TRAIN_SAMPLE, len(trained))), facts.lengths)
    if all(pair.probability == 0.5 for pair in held_out):
        return {"report": {"none": "all held-out rows are labelled as ties"}}
    made = reward_report(held_out, train, facts.eval_fates, facts.train_fates)
    return {"report": _figures(made) | _written(made, setting.recorder.report_path())}


def _figures(made: RewardReport) -> dict[str, Any]:
    """The main figures of a report as JSON-able values, and as facts in words."""
    return {
        "pairs": made.held_out.pairs,
        "accuracy": asdict(made.held_out.accuracy),
        "baselines": {name: asdict(accuracy) for name, accuracy in made.baselines.items()},
        "best_baseline": made.best_baseline,
        "over_baseline": asdict(made.over_baseline),
        "train_accuracy": asdict(made.train.accuracy) if isinstance(made.train, SplitFigures) else None,
        "gap": asdict(made.gap) if made.gap else None,
        "ece": made.calibration.ece,
        "facts": [asdict(fact) for fact in headline(made)],
        "sides": rows_of_sides(made),
    }


def _judged(setting: Setting, side: Side, rows: Sequence[int], lengths: Sequence[int]) -> list[JudgedPair]:
    arguments = [(side, share) for share in setting.shares(lengths, rows)]
    answers = setting.group.collect(setting.group.submit(RewardModelRole.judge, arguments))
    return [pair for answer in answers for pair in answer]


def _written(made: RewardReport, folder: str) -> dict[str, str]:
    """Only the process that owns the run folder writes."""
    if not folder:
        return {}
    from rlhf_dist.evaluation.report_html import write_report  # here, because plotly takes its time to load

    page = write_report(made, Path(folder), f"Reward model {Path(folder).parent.name}")
    return {"page": str(page.relative_to(Path(folder).parent))}


REWARD = Stage(name="reward", score="eval/loss", conclude=report)
