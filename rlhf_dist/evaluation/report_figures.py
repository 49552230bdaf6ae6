"""The pictures of a reward-model report, as plotly figures that read on a light and on a dark page, wide or narrow.

Colours are of middle brightness; what must follow the page (text, grid lines, intervals) is left to it.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from rlhf_dist.evaluation.calibration import Calibration
from rlhf_dist.evaluation.interval import MeanInterval
from rlhf_dist.evaluation.report_facts import shown
from rlhf_dist.evaluation.reward_report import Bucket, LengthFigures, RewardReport, ScoreFigures, SplitFigures

MODEL, TRAIN, RULE, PLAIN, WORSE = "#3b82f6", "#8b5cf6", "#64748b", "#8a94a6", "#d97706"
MAX_BUCKETS = 15
MAX_LABEL = 22
DECILES = 10
ROW_HEIGHT = 38


def accuracy_figure(report: RewardReport) -> go.Figure:
    """The model on held-out and on train comparisons, and the rules that read nothing, each with its interval."""
    bars = [("held out", report.held_out.accuracy, MODEL)]
    bars += [("train", report.train.accuracy, TRAIN)] if isinstance(report.train, SplitFigures) else []
    bars += [(name, interval, RULE) for name, interval in report.baselines.items()]
    names, intervals, colours = zip(*bars, strict=True)
    figure = go.Figure(
        go.Bar(
            y=names,
            x=[interval.mean for interval in intervals],
            error_x=_errors(intervals),
            marker_color=colours,
            orientation="h",
            hovertext=[shown(interval) for interval in intervals],
            hovertemplate="%{y}: %{hovertext}<extra></extra>",
            text=[f"{interval.mean:.3f}" for interval in intervals],
            textposition="inside",
            insidetextanchor="start",
            textfont_color="#ffffff",
        )
    )
    figure.add_vline(x=0.5, line_dash="dot", line_color=PLAIN, line_width=1)
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(range=[0, 1.02], title_text="accuracy")
    return _laid_out(figure, 90 + ROW_HEIGHT * len(bars))


def calibration_figure(calibration: Calibration) -> go.Figure:
    """Predicted probability against how often it came true, with the diagonal."""
    observed = [each.observed for each in calibration.bins]
    figure = go.Figure(go.Scatter(x=[0, 1], y=[0, 1], mode="lines", line={"color": PLAIN, "dash": "dash", "width": 1}, hoverinfo="skip"))
    figure.add_scatter(
        x=[each.predicted for each in calibration.bins],
        y=[each.mean for each in observed],
        error_y=_errors(observed),
        mode="lines+markers",
        line={"color": MODEL, "width": 2},
        marker={"size": 8},
        hovertext=[f"{shown(each)}, {each.n} comparisons" for each in observed],
        hovertemplate="predicted %{x:.2f}<br>came true %{hovertext}<extra></extra>",
    )
    figure.update_xaxes(range=[0, 1], title_text="predicted probability")
    figure.update_yaxes(range=[0, 1], title_text="came true")
    return _laid_out(figure, 360)


def histogram_figure(scores: ScoreFigures) -> go.Figure:
    """Scores of the better and of the worse answers, laid over each other."""
    edges = np.array(scores.edges)
    figure = go.Figure()
    for name, counts, colour in (("better answer", scores.better, MODEL), ("worse answer", scores.worse, WORSE)):
        figure.add_bar(
            x=(edges[:-1] + edges[1:]) / 2,
            y=counts,
            width=np.diff(edges),
            name=name,
            marker_color=colour,
            opacity=0.55,
            hovertemplate="score %{x:.3f}: %{y} answers<extra>" + name + "</extra>",
        )
    figure.update_layout(barmode="overlay", showlegend=True)
    figure.update_xaxes(title_text="score")
    figure.update_yaxes(title_text="answers")
    return _laid_out(figure, 340)


def bucket_figure(buckets: Sequence[Bucket], overall: MeanInterval) -> go.Figure:
    """Accuracy of each bucket with its interval; the dotted line is that of all. No more than the 15 first buckets are drawn."""
    drawn = buckets[:MAX_BUCKETS]
    intervals = [bucket.accuracy for bucket in drawn]
    figure = go.Figure(
        go.Scatter(
            y=list(range(len(drawn))),
            x=[interval.mean for interval in intervals],
            error_x=_errors(intervals),
            mode="markers",
            marker={"color": MODEL, "size": 10},
            hovertext=[f"{_safe(bucket.label)}: {shown(bucket.accuracy)}, {bucket.accuracy.n} comparisons" for bucket in drawn],
            hovertemplate="%{hovertext}<extra></extra>",
        )
    )
    figure.add_vline(x=overall.mean, line_dash="dot", line_color=PLAIN, line_width=1.5)
    labels = [f"{_safe(_short(bucket.label))}<br>n = {bucket.accuracy.n:,}" for bucket in drawn]
    figure.update_yaxes(tickmode="array", tickvals=list(range(len(drawn))), ticktext=labels, range=[len(drawn) - 0.5, -0.5])
    lows = [interval.mean if interval.low is None else interval.low for interval in intervals]
    figure.update_xaxes(range=[max(0.0, min(0.4, *lows, overall.mean) - 0.03), 1.02], title_text="accuracy")
    return _laid_out(figure, 90 + (ROW_HEIGHT + 8) * len(drawn))


def length_figure(lengths: LengthFigures) -> go.Figure:
    """Score against answer length: a point an answer, and the mean of each tenth of the answers by length."""
    tokens, scores = np.array([point[0] for point in lengths.points]), np.array([point[1] for point in lengths.points])
    figure = go.Figure(
        go.Scatter(
            x=tokens,
            y=scores,
            mode="markers",
            name="answers",
            marker={"color": MODEL, "size": 5, "opacity": 0.35},
            hovertemplate="%{x} tokens, score %{y:.3f}<extra></extra>",
        )
    )
    parts = [rows for rows in np.array_split(np.argsort(tokens, kind="stable"), DECILES) if len(rows)]
    figure.add_scatter(
        x=[float(tokens[rows].mean()) for rows in parts],
        y=[float(scores[rows].mean()) for rows in parts],
        mode="lines+markers",
        name="mean by length",
        line={"color": WORSE, "width": 2},
        hovertemplate="about %{x:.0f} tokens: mean score %{y:.3f}<extra></extra>",
    )
    figure.update_layout(showlegend=True)
    figure.update_xaxes(title_text="tokens of the answer")
    figure.update_yaxes(title_text="score")
    return _laid_out(figure, 360)


def _errors(intervals: Sequence[MeanInterval]) -> dict[str, Any]:
    high = [0.0 if each.high is None else each.high - each.mean for each in intervals]
    low = [0.0 if each.low is None else each.mean - each.low for each in intervals]
    return {"type": "data", "symmetric": False, "array": high, "arrayminus": low, "thickness": 1.5, "width": 4}


def _short(label: str) -> str:
    return label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 1] + "…"


def _safe(label: str) -> str:
    """Names of sources are the user's; plotly reads labels as HTML, and text in %{…} as a template."""
    return html.escape(label).replace("%{", "%&#123;")


def _laid_out(figure: go.Figure, height: int) -> go.Figure:
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": 12, "t": 28 if figure.layout.showlegend else 8, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 13, "family": "system-ui, sans-serif"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        dragmode=False,
    )
    if figure.layout.showlegend is None:
        figure.update_layout(showlegend=False)
    figure.update_xaxes(automargin=True, fixedrange=True, zeroline=False)
    figure.update_yaxes(automargin=True, fixedrange=True, zeroline=False)
    return figure
