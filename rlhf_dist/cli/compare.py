"""`rlhf-dist compare`: which of two answers a reward model prefers, and how surely; or for every row of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from rlhf_dist.cli.scoring import Job, ModelFolder, Settings, as_prompt, load_model, one_way, score_file, settings, writes_rows


@writes_rows
def compare(
    model: ModelFolder,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="text of the prompt")] = None,
    a: Annotated[str | None, typer.Option("--a", help="text of one answer")] = None,
    b: Annotated[str | None, typer.Option("--b", help="text of the other answer")] = None,
    data: Annotated[Path | None, typer.Option("--data", "-d", help="pairs, transcripts, labelled rows or rankings")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="file to write: the rows with their scores")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="the prompt is what the user says in a chat: use the chat template")] = False,
    overrides: Settings = None,
) -> None:
    """Compares two answers, or those of every row of a file.

    Pairs get `score_chosen`, `score_rejected`, `probability_chosen`; labelled rows `score_a`, `score_b`, `probability_a`; rankings
    `answer_scores`. (`probability` alone would be read as a label, should the file be trained on.)
    """
    config = settings(overrides)
    single = one_way((prompt, a, b), (data, output), ("--prompt, --a and --b", "--data and --output"))
    loaded = load_model(model, config)
    if single:
        assert prompt is not None and a is not None and b is not None
        Console().print(_answer(loaded.compare(as_prompt(prompt, chat=chat), a, b)))
        return
    assert data is not None and output is not None
    from rlhf_dist.data.preferences import PreferenceReader

    tally = _Agreement()
    fix = "give pairs, transcripts, labelled rows or rankings; rows with one completion are for `rlhf-dist score`"
    outcome = score_file(loaded, Job(data, output, PreferenceReader, fix, config), tally.columns)
    print(outcome.summary())
    for line in tally.lines():
        print(line)
    print(f"{outcome.rows} rows in {output}")


class _Agreement:
    """Makes the columns, and counts how often the better answer scores higher: by prompt, ties of the label left out."""

    def __init__(self) -> None:
        self._right: list[float] = []
        self._prompts: list[int] = []
        self._ties = 0

    def columns(self, record: Any, scores: list[float]) -> dict[str, Any]:
        """For one row."""
        from rlhf_dist.data.layouts import Ranking
        from rlhf_dist.data.records import stable_hash
        from rlhf_dist.data.splitting import split_key
        from rlhf_dist.evaluation.judged import agreement

        probability = None if isinstance(record, Ranking) else record.label_probability
        if probability == 0.5:
            self._ties += 1
        else:
            right = agreement(scores)
            self._right.append(1 - right if probability is not None and probability < 0.5 else right)
            self._prompts.append(stable_hash(split_key(record)))
        return _ranking(record.positions, scores) if isinstance(record, Ranking) else _pair(record.preferred, *scores)

    def lines(self) -> list[str]:
        """What was seen."""
        from rlhf_dist.evaluation.judged import counted
        from rlhf_dist.evaluation.proportion import clustered_share
        from rlhf_dist.evaluation.report_facts import shown

        ties = [f"{counted(self._ties, 'tie')} in the labels, in no share"] if self._ties else []
        if not self._right:
            return ties
        share = clustered_share(self._right, self._prompts)
        return [
            f"the better answer scores higher: {shown(share)} of {counted(share.n, 'row')} (95 % interval; `rlhf-dist report` says more)",
            *ties,
        ]


def _ranking(positions: tuple[int, ...], scores: list[float]) -> dict[str, Any]:
    """Scores in the order in which the answers stand in the row."""
    return {"answer_scores": [score for _, score in sorted(zip(positions, scores, strict=True))]}


def _pair(preferred: str | None, chosen: float, rejected: float) -> dict[str, Any]:
    from rlhf_dist.rewards.scorer import preference

    if preferred is None:
        return {"score_chosen": chosen, "score_rejected": rejected, "probability_chosen": preference(chosen, rejected)}
    a, b = (rejected, chosen) if preferred == "b" else (chosen, rejected)
    return {"score_a": a, "score_b": b, "probability_a": preference(a, b)}


def _answer(comparison: Any) -> Table:
    table = Table(title="which answer is the better one", title_justify="left")
    for name in ("answer", "score", "probability"):
        table.add_column(name, justify="left" if name == "answer" else "right")
    table.add_row("a", f"{comparison.score_a:.6g}", f"{comparison.probability_a:.4f}")
    table.add_row("b", f"{comparison.score_b:.6g}", f"{1 - comparison.probability_a:.4f}")
    return table
