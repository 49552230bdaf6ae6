"""`rlhf-dist data validate|stats|split|convert|balance`: the user's files looked at, cut, converted and balanced, as streams."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rlhf_dist.cli.data_tables import FaultList, print_balance, print_counts, print_statistics
from rlhf_dist.config.errors import UserError

if TYPE_CHECKING:  # the readers load transformers: seconds that `--help` need not wait for
    from transformers import PreTrainedTokenizerBase

    from rlhf_dist.data.layouts import Record
    from rlhf_dist.data.validation import ErrorPolicy, ReadCounts, Reading, TypedRow

app = typer.Typer(help="Look at data files, and cut, convert and balance them.", no_args_is_help=True)

LayoutName = Literal["prompts", "demonstrations", "messages", "pairs", "transcripts", "rankings", "labelled"]
Files = Annotated[list[Path], typer.Argument(help=".jsonl, .csv (each also .gz), .parquet, .arrow, .feather")]
File = Annotated[Path, typer.Argument(help=".jsonl, .csv (each also .gz), .parquet, .arrow, .feather")]
Layout = Annotated[LayoutName | None, typer.Option("--layout", help="of the files; told from their rows by default")]
Columns = Annotated[list[str] | None, typer.Option("--column", help="part=name: a column of another name, such as prompt=query_text")]
Errors = Annotated[Literal["error", "drop"], typer.Option("--errors", help="a faulty row stops, or is dropped and counted")]
Tokenizer = Annotated[str | None, typer.Option("--tokenizer", help="model folder or hub name")]
Json = Annotated[Path | None, typer.Option("--json", help="file to write the result to, as JSON")]


@app.command("validate")
def validate(files: Files, layout: Layout = None, column: Columns = None, tokenizer: Tokenizer = None, json_out: Json = None) -> None:
    """Lists every bad row by file and line, with the reason; status 2 if there is one."""
    from rlhf_dist.data.faults import RowFault
    from rlhf_dist.data.validation import ReadCounts, faults

    counts, damaged, loaded = ReadCounts(), 0, _tokenizer(tokenizer)
    with FaultList(json_out) as listed:
        for fault in faults([str(file) for file in files], _reading(layout, column), counts, loaded):
            if isinstance(fault, RowFault):
                print(f"{fault.where}: {fault.reason}: {fault.detail}")
                listed.add({"where": fault.where, "reason": fault.reason, "detail": fault.detail})
            else:
                damaged += 1
                print(f"{fault.where}: {fault.what}\n  do: {fault.fix}")
                listed.add({"where": fault.where, "reason": "unreadable file", "detail": fault.what})
        listed.finish({"rows": counts.rows, "good": counts.accepted, "by_reason": dict(counts.dropped), "unreadable_files": damaged})
    print_counts(counts, damaged)
    if damaged or counts.dropped:
        raise typer.Exit(2)


@app.command("stats")
def stats(files: Files, layout: Layout = None, column: Columns = None, tokenizer: Tokenizer = None, json_out: Json = None) -> None:
    """Layouts, counts, lengths, balance of labels, repeats, and prompts that files share: give a split as train, then eval."""
    from rlhf_dist.data.statistics import collect

    report = collect([str(file) for file in files], _reading(layout, column), _tokenizer(tokenizer))
    print_statistics(report)
    if json_out:
        json_out.write_text(json.dumps(report.as_dict(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


@app.command("split")
def split(
    file: File,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write train and eval to")],
    eval_share: Annotated[float, typer.Option("--eval", help="share of the prompts held out, between 0 and 1")] = 0.1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="another seed cuts otherwise")] = 0,
    layout: Layout = None,
    column: Columns = None,
    errors: Errors = "error",
) -> None:
    """Cuts a file in two by prompt: rows with the same prompt, whatever its spacing and case, stay together."""
    from rlhf_dist.data.splitting import side
    from rlhf_dist.data.validation import ReadCounts
    from rlhf_dist.data.writing import RowWriter, refuse_overwriting

    if not 0 < eval_share < 1:
        raise UserError(f"--eval is {eval_share:g}", fix="give a share between 0 and 1, such as 0.1")
    counts, paths = ReadCounts(), {name: out / f"{name}{_ending(file)}" for name in ("train", "eval")}
    for path in paths.values():
        refuse_overwriting(path, [str(file)])
    with RowWriter(paths["train"]) as train, RowWriter(paths["eval"]) as held_out:
        for typed, record in _good_rows([file], _reading(layout, column), errors, counts):
            (held_out if side(record, eval_share, seed) == "eval" else train).write(typed.row)
        if not train.rows or not held_out.rows:
            name = "train" if not train.rows else "eval"
            raise UserError(f"no row falls into {name}: {counts.summary()}", where=str(file), fix="change --eval or --seed")
    print_counts(counts)
    for name, writer in (("train", train), ("eval", held_out)):
        print(f"{name}: {writer.rows} rows ({writer.rows / counts.accepted:.1%}) in {writer.path}")


@app.command("convert")
def convert(
    file: File,
    output: Annotated[Path, typer.Argument(help="file to write: .jsonl, .csv (each also .gz), .parquet")],
    to: Annotated[Literal["prompts", "demonstrations", "pairs", "messages", "transcripts"], typer.Option("--to", help="layout to make")],
    layout: Layout = None,
    column: Columns = None,
    errors: Errors = "error",
) -> None:
    """Writes the rows in another layout; a ranking becomes all its pairs, a transcript turns. Other columns travel along."""
    from rlhf_dist.data.conversion import converted
    from rlhf_dist.data.layouts import names_with
    from rlhf_dist.data.validation import ReadCounts
    from rlhf_dist.data.writing import RowWriter, refuse_overwriting

    counts, reading = ReadCounts(), _reading(layout, column)
    refuse_overwriting(output, [str(file)])
    with RowWriter(output) as writer:
        for row in converted(_good_rows([file], reading, errors, counts), to, names_with(reading.columns)):
            writer.write(row)
    print_counts(counts)
    print(f"{to}: {writer.rows} rows in {output}")


@app.command("balance")
def balance(
    files: Files,
    out: Annotated[Path, typer.Option("--out", "-o", help="file to write: .jsonl, .csv (each also .gz), .parquet")],
    by: Annotated[str, typer.Option("--by", help="source, label, or a column")] = "source",
    cap: Annotated[int | None, typer.Option("--cap", min=1, help="rows kept of each group, drawn by seed")] = None,
    weight: Annotated[bool, typer.Option("--weight", help="write a column `weight` that gives each group the same total")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the draw")] = 0,
    column: Columns = None,
    errors: Errors = "error",
) -> None:
    """Caps the rows of each group, or weighs them, so that no kind of feedback dominates; several files become one."""
    from rlhf_dist.data.balancing import Grouping, capped, group_counts, weighted, weights
    from rlhf_dist.data.validation import ReadCounts
    from rlhf_dist.data.writing import RowWriter, refuse_overwriting

    if (cap is None) == (not weight):
        raise UserError("give one of --cap and --weight", fix="--cap N leaves rows out, --weight keeps all and weighs them")
    refuse_overwriting(out, [str(file) for file in files])
    reading, grouping = _reading(None, column), Grouping(by)
    counts: list[ReadCounts] = []  # one a pass

    def good_rows() -> Iterator[tuple[TypedRow, Record]]:
        counts.append(ReadCounts())
        return _one_layout(_good_rows(files, reading, errors, counts[-1]))

    before = group_counts(good_rows(), grouping)
    group_weights = weights(before) if weight else dict.fromkeys(before, 1.0)
    after = dict.fromkeys(before, 0)
    rows = good_rows() if cap is None else capped(good_rows, grouping, cap, seed)
    with RowWriter(out) as writer:
        for (typed, record), value in weighted(rows, grouping, group_weights):
            after[grouping.of(typed, record)] += 1
            writer.write(typed.row | {"source": record.origin.source} | ({"weight": value} if weight else {}))
    print_counts(counts[-1])
    print_balance(by, before, after, group_weights)
    print(f"{writer.rows} rows in {out}")


def _reading(layout: LayoutName | None, columns: list[str] | None) -> Reading:
    from rlhf_dist.data.layouts import NAMES
    from rlhf_dist.data.validation import Reading

    named = {}
    for given in columns or ():
        part, equals, name = given.partition("=")
        if not equals or not name or part not in NAMES:
            raise UserError(f"--column {given} does not name a part and its column", fix=f"write part=name; parts are {', '.join(NAMES)}")
        named[part] = name
    return Reading(layout, named)


def _tokenizer(name: str | None) -> PreTrainedTokenizerBase | None:
    if name is None:
        return None
    from rlhf_dist.models.loading import load_tokenizer
    from rlhf_dist.models.quiet import quiet_libraries

    quiet_libraries()
    return load_tokenizer(name)


def _good_rows(files: Sequence[Path], reading: Reading, errors: ErrorPolicy, counts: ReadCounts) -> Iterator[tuple[TypedRow, Record]]:
    from rlhf_dist.data.validation import accepted, typed_rows

    for file in files:
        yield from accepted(typed_rows(str(file), reading), counts, errors)
    if not counts.accepted:
        raise UserError(
            f"no good row is left: {counts.summary()}", where=", ".join(map(str, files)), fix="`rlhf-dist data validate` lists them"
        )


def _one_layout(rows: Iterator[tuple[TypedRow, Record]]) -> Iterator[tuple[TypedRow, Record]]:
    """Refuses to write files of two layouts into one."""
    first: TypedRow | None = None
    for typed, record in rows:
        first = first or typed
        if typed.layout != first.layout:
            raise UserError(
                f"the files differ in their layouts: {first.layout} in {first.file}, {typed.layout} here",
                where=typed.file,
                fix="make them alike with `rlhf-dist data convert` first",
            )
        yield typed, record


def _ending(file: Path) -> str:
    """The ending of a part of a split: that of the file, or the nearest that can be written."""
    name = file.name.lower()
    gzipped = ".gz" if name.endswith(".gz") else ""
    suffix = Path(name.removesuffix(".gz")).suffix
    return {".csv": ".csv", ".parquet": ".parquet", ".arrow": ".parquet", ".feather": ".parquet", ".ipc": ".parquet"}.get(
        suffix, ".jsonl"
    ) + gzipped
