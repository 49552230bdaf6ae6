"""The reward-model report as files: `report.json`, and `report.html`, one page that opens anywhere, without a network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from rlhf_dist.evaluation.judged import counted
from rlhf_dist.evaluation.report_facts import correlation, headline, number, rows_of_sides, shown
from rlhf_dist.evaluation.report_figures import (
    MAX_BUCKETS,
    accuracy_figure,
    bucket_figure,
    calibration_figure,
    histogram_figure,
    length_figure,
)
from rlhf_dist.evaluation.reward_report import Bucket, RewardReport
from rlhf_dist.runs.atomic import write_text

JSON_NAME, HTML_NAME = "report.json", "report.html"


@dataclass(frozen=True)
class Picture:
    """A figure of the page, with what good looks like in plain words, and its numbers as a table (rows of cells, the first a heading)."""

    key: str
    title: str
    words: str
    figure: go.Figure
    table: tuple[tuple[str, ...], ...] = ()


def write_report(report: RewardReport, folder: Path, title: str) -> Path:
    """Writes `report.json` and `report.html` into the folder, which is made; returns the path of the page.

    Raises:
        OSError: the folder cannot be written to.
    """
    write_text(folder / JSON_NAME, json.dumps({"title": title, **report.to_dict()}, ensure_ascii=False, indent=2, allow_nan=False) + "\n")
    write_text(folder / HTML_NAME, page(report, title))
    return folder / HTML_NAME


def page(report: RewardReport, title: str) -> str:
    """The whole page, plotly included."""
    pictures = _pictures(report)
    figures = {picture.key: json.loads(picture.figure.to_json()) for picture in pictures}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(files("rlhf_dist.evaluation").joinpath("reward_report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        facts=headline(report),
        splits=rows_of_sides(report),
        pictures=pictures,
        figures=json.dumps(figures).replace("<", "\\u003c"),  # no text can end the script
        plotly=get_plotlyjs(),
    )


def _pictures(report: RewardReport) -> list[Picture]:
    return [
        Picture(
            "accuracy",
            "Accuracy beside trivial rules",
            "Good: the held-out bar ends clearly right of every grey one, intervals included, and the train bar is not much longer.",
            accuracy_figure(report),
        ),
        Picture(
            "calibration",
            "Calibration",
            "Good: the points lie on the dashed diagonal, within intervals. Flatter: the model is too sure of itself; steeper: not enough.",
            calibration_figure(report.calibration),
            (
                ("predicted", "came true", "n"),
                *((f"{each.predicted:.3f}", shown(each.observed), f"{each.observed.n:,}") for each in report.calibration.bins),
            ),
        ),
        Picture(
            "scores",
            "Scores of better and worse answers",
            "Good: two hills, the better answers to the right. One hill: the model cannot tell them apart. "
            f"On average: better − worse = {number(report.scores.mean_difference, '+')}.",
            histogram_figure(report.scores),
        ),
        *_bucket_pictures(report),
        Picture(
            "lengths",
            "Score against answer length",
            f"Good: a flat cloud. A rising line is a model that a policy can please by writing more. Pearson "
            f"{correlation(report.lengths.pearson)}, Spearman {correlation(report.lengths.spearman)}; "
            f"{counted(len(report.lengths.points), 'answer')} drawn.",
            length_figure(report.lengths),
        ),
    ]


def _bucket_pictures(report: RewardReport) -> list[Picture]:
    drawn = f" The {MAX_BUCKETS} largest are drawn." if len(report.by_source) > MAX_BUCKETS else ""
    without = f" Without a margin: {counted(report.without_margin, 'comparison')}." if report.without_margin else ""
    kinds = (
        (
            "source",
            "By source",
            f"Good: no source falls far behind the dotted line, which is the accuracy on all.{drawn}",
            report.by_source,
        ),
        (
            "margin",
            "By margin of the label",
            f"Good: it rises from top to bottom: what people found clear is clear to the model.{without}",
            report.by_margin,
        ),
        (
            "length",
            "By length of the longer answer, in tokens",
            "Good: about the same everywhere. A fall at the end: long answers are judged badly, or were cut.",
            report.by_length,
        ),
        (
            "length_difference",
            "Better answer shorter or longer, in tokens",
            "Good: about the same everywhere. Rising from top to bottom: the model pays for length, whatever it says.",
            report.by_length_difference,
        ),
    )
    overall = report.held_out.accuracy
    return [
        Picture(f"by_{key}", f"Accuracy: {title[0].lower()}{title[1:]}", words, bucket_figure(buckets, overall), _table(buckets))
        for key, title, words, buckets in kinds
        if buckets
    ]


def _table(buckets: tuple[Bucket, ...]) -> tuple[tuple[str, ...], ...]:
    rows = ((bucket.label, shown(bucket.accuracy), f"{bucket.accuracy.n:,}") for bucket in buckets)
    return (("bucket", "accuracy", "n"), *rows)
