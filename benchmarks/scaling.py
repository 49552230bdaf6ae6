"""Does the time of a PPO iteration grow as the FLOP model says, when the batch doubles and when the length doubles?

Three processes of our loop in a plain process (`peers/ours_ppo.py`), which take turns: some rows; the same rows once more with other
tokens; the same rows with prompts and completions twice as long. All take the same number of optimizer steps. Growth of the median time
is held against growth of the floating-point operations (`limits.Iteration`): a ratio above 1.10 is more than the issue of speed allows.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --dtype bfloat16 --full --rows 16 policy.packing=true
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from limits import Iteration, Lengths
from manifest import RESULTS, manifest, spread, write
from measuring import here
from rich.console import Console
from rich.table import Table
from turns import ours, take_turns
from workload import Rows, Shape, make_rows, sampled, save_models, twice_the_batch, twice_the_length, without_head, write_job

ALLOWED = 1.10


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value of the PPO config, for all three")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    ragged: Annotated[bool, typer.Option("--ragged/--full", help="log-normal lengths, or all of full length")] = True,
    rows: Annotated[int, typer.Option(help="completions of the smaller batch")] = 16,
    limit: Annotated[int, typer.Option(help="longest completion of the shorter rows, in tokens")] = 96,
    repeats: Annotated[int, typer.Option(help="timed iterations of each")] = 3,
    warm_up: Annotated[int, typer.Option(help="iterations before those")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
    hidden: Annotated[int, typer.Option(help="hidden size")] = 512,
    layers: Annotated[int, typer.Option(help="layers")] = 8,
    vocabulary: Annotated[int, typer.Option(help="words of the tokenizer")] = 32000,
    results: Annotated[Path, typer.Option(help="folder of the JSON")] = RESULTS,
) -> None:
    """Runs the three in turns and prints a table; the figures go to benchmarks/results/ as JSON."""
    shape, device = Shape(hidden, layers, vocabulary), here()
    base = make_rows(rows, limit, ragged=ragged, vocabulary=vocabulary)
    work = {"base": base, "batch × 2": twice_the_batch(base, vocabulary), "length × 2": twice_the_length(base, vocabulary)}
    workload = {"dtype": dtype, "ragged": ragged, "rows": rows, "limit": limit, "minibatches": 4} | asdict(shape)
    workload |= {"overrides": overrides or []}
    with tempfile.TemporaryDirectory() as temporary:
        models = save_models(Path(temporary) / "models", shape)
        jobs = {
            name: write_job(Path(temporary) / str(number), models, workload, given, iterations=repeats + warm_up, threads=threads)
            for number, (name, given) in enumerate(work.items())
        }
        measured = take_turns({name: ours(job, device) for name, job in jobs.items()}, repeats, warm_up)
    report = summary(measured, flops(shape, work))
    facts = manifest(
        "ours", workload | {name: given.facts() for name, given in work.items()}, threads, device, warm_up=warm_up, repeats=repeats
    )
    show(report, f"{dtype}, {rows} rows of up to {limit} tokens, {threads} threads, {device}")
    shaped = "ragged" if ragged else "full"
    write(
        f"scaling_llama{hidden}x{layers}_{shaped}_{device}_{dtype}_r{rows}x{limit}_t{threads}",
        report | {"manifest": asdict(facts)},
        results,
    )


def flops(shape: Shape, work: dict[str, Rows]) -> dict[str, float]:
    """Operations of an iteration on each: policy, reference and two models of one output (growth hardly depends on what is trained how)."""
    policy = sampled(shape)
    language, scorer = policy.flops, without_head(policy.flops)
    trained = [model.training(frozen=False, recomputed=False) for model in (language, scorer)]
    iteration = Iteration(policy, scored=(language, scorer, scorer), trained=trained)
    return {name: iteration.flops(Lengths(rows.prompt_lengths, rows.lengths)) for name, rows in work.items()}


def summary(measured: dict[str, list[dict[str, float]]], flops: dict[str, float]) -> dict[str, Any]:
    """Seconds with their spread; growth to the base, of time and of operations, and the quotient of the two.

    Growth is that of each round, so that a machine that slows down slows both sides.
    """
    seconds = {name: asdict(spread([line["seconds"] for line in lines])) for name, lines in measured.items()}
    growth = {}
    for name in list(measured)[1:]:
        pairs = zip(measured[name], measured["base"], strict=True)
        grown = spread([line["seconds"] / base["seconds"] for line, base in pairs])
        predicted = flops[name] / flops["base"]
        growth[name] = {"measured": asdict(grown), "predicted": predicted, "ratio": grown.median / predicted}
    return {"seconds": seconds, "growth": growth, "flops": flops, "measured": measured}


def show(report: dict[str, Any], title: str) -> None:
    """The table a person reads."""
    table = Table(title=title)
    for column in ("", "iteration, s", "grows", "lowest to highest", "FLOP model", "measured / model"):
        table.add_column(column, justify="right" if column else "left")
    for name, seconds in report["seconds"].items():
        grown = report["growth"].get(name)
        cells = (
            ("", "", "", "")
            if grown is None
            else (
                f"{grown['measured']['median']:.2f} ×",
                f"{grown['measured']['low']:.2f} to {grown['measured']['high']:.2f}",
                f"{grown['predicted']:.2f} ×",
                f"{grown['ratio']:.2f}",
            )
        )
        table.add_row(name, f"{seconds['median']:.2f}", *cells)
    console = Console()
    console.print(table)
    console.print(f"measured / model: at most {ALLOWED:.2f} is asked for")


if __name__ == "__main__":
    typer.run(main)
