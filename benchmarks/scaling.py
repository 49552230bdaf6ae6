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
from typing import Any

from limits import Iteration, Lengths
from manifest import change_suffix, manifest, spread, write
from measuring import here
from options import Options, command
from rich.console import Console
from rich.table import Table
from turns import ours, take_turns
from workload import Rounds, Rows, Shape, make_rows, sampled, save_models, twice_the_batch, twice_the_length, without_head, write_job

ALLOWED = 1.10


def main(given: Options) -> None:
    """Runs the three in turns and prints a table; the figures go to benchmarks/results/ as JSON."""
    shape, device, rounds = given.shape, here(), Rounds(given.repeats, given.warm_up)
    base = make_rows(given.rows, given.limit, ragged=given.ragged, vocabulary=shape.vocabulary)
    work = {
        "base": base,
        "batch × 2": twice_the_batch(base, shape.vocabulary),
        "length × 2": twice_the_length(base, shape.vocabulary),
    }
    with tempfile.TemporaryDirectory() as temporary:
        models = save_models(Path(temporary) / "models", shape)
        jobs = {
            name: write_job(Path(temporary) / str(number), models, given.workload, rows, rounds=rounds, threads=given.threads)
            for number, (name, rows) in enumerate(work.items())
        }
        measured = take_turns({name: ours(job, device) for name, job in jobs.items()}, given.repeats, given.warm_up)
    report = summary(measured, flops(shape, work))
    workload = given.workload | {name: rows.facts() for name, rows in work.items()}
    facts = manifest("ours", workload, given.threads, device, warm_up=given.warm_up, repeats=given.repeats)
    show(report, given.title(device))
    size = f"{given.lengths}_{device}_{given.dtype}_r{given.rows}x{given.limit}_t{given.threads}"
    name = f"scaling_llama{shape.hidden}x{shape.layers}_{size}{change_suffix(given.overrides)}"
    write(name, report | {"manifest": asdict(facts)}, given.results)


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
    command(main, Options(rows=16, limit=96))
