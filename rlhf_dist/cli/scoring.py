"""What `score`, `compare` and `report` share: loading the model, and files of rows scored as a stream."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from rlhf_dist.cli.outputs import Overwrite, check_output_file, mendable
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.loading import load_config
from rlhf_dist.config.scoring import ScoringConfig

if TYPE_CHECKING:  # the readers and models load transformers: seconds that `--help` need not wait for
    from rlhf_dist.data.layouts import Demonstration, PreferencePair, Ranking
    from rlhf_dist.data.reading import RecordReader
    from rlhf_dist.data.token_rows import TokenRow
    from rlhf_dist.data.validation import ReadCounts
    from rlhf_dist.rewards.scorer import RewardModel

CHUNK_ROWS = 256

ModelFolder = Annotated[str, typer.Option("--model", "-m", help="folder of the reward model (any Hugging Face sequence classifier)")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        help="key=value: model.dtype, model.device, model.quantize, model.label, model.transform, model.microbatch_tokens, model.packing, "
        "data.max_tokens, data.overlong (error, drop, truncate), data.faults (error, drop) …"
    ),
]


@dataclass(frozen=True)
class Job:
    """A file to score: from where to where, the layouts that make sense, and what to do with faulty rows."""

    data: Path
    output: Path
    reader: type[RecordReader]
    fix: str
    config: ScoringConfig


@dataclass
class Outcome:
    """rows: written. counts: of the reading. fates: rows left out or cut, by reason."""

    counts: ReadCounts
    rows: int = 0
    fates: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """One line, with every reason."""
        return "; ".join([self.counts.summary(), *(f"{count} {reason}" for reason, count in sorted(self.fates.items()))])


def settings(overrides: Sequence[str] | None) -> ScoringConfig:
    """The settings of the command line.

    Raises:
        UserError: an unknown key, a wrong value.
    """
    return load_config(ScoringConfig, None, overrides or ())


def load_model(folder: str, config: ScoringConfig) -> RewardModel:
    """The reward model.

    Raises:
        UserError: it cannot be loaded.
    """
    from rlhf_dist.models.quiet import quiet_libraries

    quiet_libraries()  # before the libraries are imported: some speak while they load
    from rlhf_dist.rewards.scorer import RewardModel

    return RewardModel.from_config(folder, config)


def writes_rows(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option `--overwrite`; its `--output` is looked at before it begins: the model takes its time to load.

    Raises:
        UserError: the output may not be written (`cli.outputs`), or is the `--data` that is read.
    """

    @functools.wraps(command)
    def checked(*, overwrite: bool, **given: Any) -> None:
        if given["output"] is not None and given["data"] is not None:
            from rlhf_dist.data.writing import refuse_overwriting

            refuse_overwriting(given["output"], [str(given["data"])])
            check_output_file(given["output"], overwrite=overwrite)
        command(**given)

    shown: Any = inspect.signature(command, eval_str=True)
    added = inspect.Parameter("overwrite", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Overwrite)
    checked.__signature__ = shown.replace(parameters=[*shown.parameters.values(), added])  # type: ignore[attr-defined]
    return checked


def one_way(single: Sequence[object], files: Sequence[object], names: tuple[str, str]) -> bool:
    """Whether one text was given on the command line, and not a file.

    Raises:
        UserError: neither is complete, or both were begun.
    """
    if any(each is not None for each in single) and any(each is not None for each in files):
        raise UserError(f"{names[0]} and {names[1]} exclude each other", where="command line", fix="give one or the other")
    if all(each is not None for each in single) or all(each is not None for each in files):
        return single[0] is not None
    raise UserError("there is nothing to score, or only a part of it", where="command line", fix=f"give {names[0]}, or {names[1]}")


def as_prompt(text: str, *, chat: bool) -> str | list[dict[str, str]]:
    """The prompt as it stands, or as what the user says in a chat."""
    return [{"role": "user", "content": text}] if chat else text


def score_file(model: RewardModel, job: Job, columns: Callable[[Any, list[float]], dict[str, Any]]) -> Outcome:
    """Writes every row with the columns that `columns(record, scores)` makes; scores are in the order of `answers_of`.

    Raises:
        UserError: an unreadable file, another layout, a faulty or too long row where that is an error, a column that the rows already have,
            no row left, a score that is not finite, a disk that takes no more.
    """
    from rlhf_dist.data.validation import ReadCounts
    from rlhf_dist.data.writing import RowWriter

    outcome = Outcome(ReadCounts())
    with mendable(job.output), RowWriter(job.output) as writer, progress() as advance:
        encoded = _encoded(model, job, outcome)
        while chunk := list(itertools.islice(encoded, CHUNK_ROWS)):
            scores = iter(model.score_rows([row for _, _, rows in chunk for row in rows]))
            for given, record, rows in chunk:
                added = columns(record, [next(scores) for _ in rows])
                writer.write(given | _new(added, given, record.origin.where))
            advance(len(chunk))
        outcome.rows = writer.rows
        if not outcome.rows:
            raise UserError(f"no row is left: {outcome.summary()}", where=str(job.data), fix="`rlhf-dist data validate` lists faulty rows")
    return outcome


def answers_of(record: Demonstration | PreferencePair | Ranking) -> Sequence[str]:
    """The answers to a record's prompt: the completion; chosen and rejected; the ranked ones, best first."""
    from rlhf_dist.data.layouts import Demonstration, Ranking

    if isinstance(record, Demonstration):
        return (record.completion,)
    return record.answers if isinstance(record, Ranking) else (record.chosen, record.rejected)


@contextmanager
def progress() -> Iterator[Callable[[int], None]]:
    """A bar of scored rows on a terminal, nothing in a log; yields what moves it."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("scoring", total=None)
        yield lambda rows: bar.advance(task, rows)


def _encoded(model: RewardModel, job: Job, outcome: Outcome) -> Iterator[tuple[dict[str, Any], Any, tuple[TokenRow, ...]]]:
    from rlhf_dist.data.validation import accepted, require_layout, typed_rows
    from rlhf_dist.workers.rows import refusals

    for typed, record in accepted(typed_rows(str(job.data)), outcome.counts, job.config.data.faults):
        require_layout(typed, job.reader.wanted, job.reader.what, job.fix)
        known: Any = record
        rows: tuple[TokenRow, ...] = ()
        with refusals(job.config.data.faults, outcome.fates):
            rows, fate = model.encode(known.prompt, answers_of(known), record.origin.where)
            outcome.fates.update([fate] if fate else [])
        if rows:
            yield typed.row, record, rows


def _new(added: dict[str, Any], row: dict[str, Any], where: str) -> dict[str, Any]:
    taken = sorted(added.keys() & row.keys())
    if taken:
        raise UserError(f"the row has a column {taken[0]!r} already", where=where, fix="rename it: scores would be written over it")
    return added
