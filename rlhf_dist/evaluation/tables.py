"""Before and after as tables for a terminal of 100 columns."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from rlhf_dist.evaluation.before_after import Comparison, Example, Pair
from rlhf_dist.evaluation.interval import MeanInterval

LABELS = {"kl": "KL (nats)", "length": "length (tokens)", "stop_rate": "stop rate"}
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def headline_table(comparison: Comparison) -> Table:
    """Score, each reward, KL, length and stop rate: before, after and their paired difference, each with its 95 % interval."""
    table = Table(title="Held-out prompts, before and after", caption=_counts(comparison), title_justify="left", caption_justify="left")
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, overflow="fold")
    names = list(comparison.before.means) + [name for name in comparison.after.means if name not in comparison.before.means]
    for name in names:
        means = (comparison.before.means.get(name), comparison.after.means.get(name))
        cells = [_interval(mean) for mean in means] + [_interval(comparison.differences.get(name), sign="+")]
        table.add_row(Text(LABELS.get(name, name)), *cells)
    return table


def samples_table(examples: Sequence[Example], max_characters: int = 600) -> Table:
    """Samples to read, a row each: why it was chosen with its scores, prompt, completion before, completion after.

    Args:
        examples: from `representative`.
        max_characters: longer texts are cut in the display, and say by how much.
    """
    table = Table(
        title="Samples, before and after",
        caption="first scored sample of a prompt; prompts ranked by the change of its score",
        title_justify="left",
        caption_justify="left",
        show_lines=True,
    )
    table.add_column("score", min_width=14, overflow="fold")
    for heading, ratio in (("prompt", 2), ("before", 3), ("after", 3)):
        table.add_column(heading, ratio=ratio, overflow="fold")
    for example in examples:
        texts = (example.pair.prompt, example.pair.before, example.pair.after)
        table.add_row(_scores(example.reason, example.pair), *(_shown(text, max_characters) for text in texts))
    return table


def _counts(comparison: Comparison) -> str:
    parts = [
        f"{comparison.after.samples} samples of {comparison.after.prompts} prompts; 95 % intervals, clustered by prompt; change: paired"
    ]
    if comparison.unpaired:
        parts.append(f"{comparison.unpaired} samples stand in one evaluation only and are in no change")
    for when, result in (("before", comparison.before), ("after", comparison.after)):
        parts += [f"{when}: {count} samples without {name}" for name, count in result.missing.items()]
    return "\n".join(parts)


def _interval(mean: MeanInterval | None, sign: str = "") -> Text:
    if mean is None:
        return Text("not measured")
    if mean.low is None or mean.high is None:
        return Text(f"{_number(mean.mean, sign)} (one prompt)")
    return Text(f"{_number(mean.mean, sign)} [{_number(mean.low, sign)}, {_number(mean.high, sign)}]")


def _number(value: float, sign: str = "") -> str:
    """Four digits or so, without exponents that a reader must decode."""
    decimals = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    return f"{value:{sign}.{decimals}f}"


def _scores(reason: str, pair: Pair) -> Text:
    before, after = (_score(score) for score in (pair.score_before, pair.score_after))
    gain = "" if pair.gain is None else f"\n{_number(pair.gain, '+')}"
    return Text(f"{reason}\n{before} → {after}{gain}")


def _score(score: float | None) -> str:
    return "no score" if score is None else _number(score)


def _shown(text: str, max_characters: int) -> Text:
    """Text as text: no markup, and control characters spelled out, because a model may well write a terminal escape."""
    hidden = len(text) - max_characters
    cut = f"{text[:max_characters]}… (+{hidden} characters)" if hidden > 0 else text
    return Text(_CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", cut))
