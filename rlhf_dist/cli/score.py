"""`rlhf-dist score`: what a reward model gives a completion, or every row of a file."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from rlhf_dist.cli.scoring import Job, ModelFolder, Settings, as_prompt, load_model, one_way, score_file, settings, writes_rows


@writes_rows
def score(
    model: ModelFolder,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="text of the prompt")] = None,
    completion: Annotated[str | None, typer.Option("--completion", "-c", help="text of the answer")] = None,
    data: Annotated[Path | None, typer.Option("--data", "-d", help="rows of prompt + completion, or dialogues as messages")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="file to write: the rows with a column `score`")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="the prompt is what the user says in a chat: use the chat template")] = False,
    overrides: Settings = None,
) -> None:
    """Scores one completion, or every row of a file."""
    config = settings(overrides)
    single = one_way((prompt, completion), (data, output), ("--prompt and --completion", "--data and --output"))
    loaded = load_model(model, config)
    if single:
        assert prompt is not None and completion is not None
        value = loaded.score([as_prompt(prompt, chat=chat)], [completion])[0]
        print(f"score: {value:.6g}")
        return
    assert data is not None and output is not None
    from rlhf_dist.data.demonstrations import DemonstrationReader

    seen = array("d")

    def column(_: object, scores: list[float]) -> dict[str, float]:
        seen.append(scores[0])
        return {"score": scores[0]}

    fix = "give rows of prompt + completion or messages; pairs and rankings are for `rlhf-dist compare`"
    outcome = score_file(loaded, Job(data, output, DemonstrationReader, fix, config), column)
    print(outcome.summary())
    Console(soft_wrap=True).print(_summary(np.array(seen)))
    print(f"{outcome.rows} rows in {output}")


def _summary(scores: np.ndarray) -> Table:
    table = Table(title="scores", title_justify="left")
    low, lower, median, upper, high = np.quantile(scores, [0, 0.25, 0.5, 0.75, 1])
    figures = {"rows": len(scores), "mean": scores.mean(), "min": low, "25 %": lower, "median": median, "75 %": upper, "max": high}
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(*(f"{value:,}" if isinstance(value, int) else f"{value:.4g}" for value in figures.values()))
    return table
