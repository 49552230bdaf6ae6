"""`rlhf-dist report`: how good a saved reward model is on comparisons, as a page with pictures and as JSON."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_dist.cli.outputs import Overwrite, check_output_folder, mendable
from rlhf_dist.cli.scoring import CHUNK_ROWS, ModelFolder, Settings, load_model, progress, settings
from rlhf_dist.config.scoring import ScoringConfig
from rlhf_dist.config.supervised import RowsSection

if TYPE_CHECKING:
    from rlhf_dist.evaluation.judged import JudgedPair, RowFates
    from rlhf_dist.evaluation.report_facts import Fact
    from rlhf_dist.evaluation.reward_report import RewardReport
    from rlhf_dist.rewards.scorer import RewardModel


def report(
    model: ModelFolder,
    data: Annotated[list[Path], typer.Option("--data", "-d", help="held-out comparisons: pairs, transcripts, labelled rows, rankings")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write report.html and report.json to")],
    train_data: Annotated[list[Path] | None, typer.Option("--train-data", help="comparisons it was trained on; 2,000 are drawn")] = None,
    title: Annotated[str | None, typer.Option("--title", help="of the page")] = None,
    overwrite: Overwrite = False,
    overrides: Settings = None,
) -> None:
    """Judges held-out comparisons and reports: accuracy beside trivial rules, calibration, overfitting, bias to length."""
    config = settings(overrides)
    check_output_folder(out, overwrite=overwrite)
    loaded = load_model(model, config)
    from rlhf_dist.evaluation.report_html import write_report
    from rlhf_dist.evaluation.reward_report import reward_report
    from rlhf_dist.training.reward_model import TRAIN_SAMPLE

    held_out, fates = _judged(loaded, data, config)
    train, train_fates = _judged(loaded, train_data, config, TRAIN_SAMPLE) if train_data else ([], {})
    made = reward_report(held_out, train, fates, train_fates)
    with mendable(out):
        page = write_report(made, out, title or f"Reward model {model} on {', '.join(path.name for path in data)}")
    Console().print(table_of(made))
    print(f"report: {page}")


def table_of(made: RewardReport) -> Table:
    """The main figures, and what became of the rows, for a terminal."""
    from rlhf_dist.evaluation.report_facts import headline, rows_of_sides

    return facts_table(headline(made), rows_of_sides(made))


def facts_table(facts: Iterable[Fact], sides: Iterable[tuple[str, str, RowFates]]) -> Table:
    """Facts, and by side its name, its counts in words and the fates of its rows."""
    table = Table(show_header=False)
    for fact in facts:
        style = {"good": "green", "bad": "bold red", "plain": ""}[fact.tone]
        table.add_row(fact.name, Text(fact.value, style=style), fact.meaning)
    for name, counts, fates in sides:
        lost = "\n".join(f"{count:,} {reason}" for reason, count in fates.items())
        table.add_row(f"Rows, {name}", counts, lost or "no row dropped or cut")
    return table


def _judged(
    model: RewardModel, files: Sequence[Path], config: ScoringConfig, sample: int | None = None
) -> tuple[list[JudgedPair], RowFates]:
    """The comparisons of the files with the model's scores; at most `sample` rows, drawn by a fixed seed."""
    from rlhf_dist.evaluation.judged import judged_pairs
    from rlhf_dist.training.reward_model import SAMPLE_SEED
    from rlhf_dist.workers.rows import preference_rows

    limit = model.limits.max_tokens or sys.maxsize  # a model that names no context has no limit
    section = RowsSection(train=[str(path) for path in files], max_tokens=limit, overlong=config.data.overlong, faults=config.data.faults)
    read = preference_rows(section, model.encoder, as_pairs=False)
    rows = read.train if sample is None or len(read.train) <= sample else random.Random(SAMPLE_SEED).sample(list(read.train), sample)
    pairs: list[JudgedPair] = []
    with progress() as advance:
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = rows[start : start + CHUNK_ROWS]
            scores = iter(model.score_rows([answer for row in chunk for answer in row.answers]))
            pairs += [pair for row in chunk for pair in judged_pairs(row, [next(scores) for _ in row.answers])]
            advance(len(chunk))
    return pairs, dict(read.fates)
