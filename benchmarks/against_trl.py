"""One PPO iteration beside TRL's PPO trainer: the same models, prompts, forced lengths, minibatches and optimizer steps, on one machine.

Four Llama-shaped models of 41M parameters with random weights (policy, reference, value, reward), 32 prompts of up to 48 tokens,
completions of up to 128: ragged (log-normal, a third of the limit on average) or all of full length; one PPO epoch of four minibatches.
Each side is a process of its own in an environment of its own with the same torch and the same number of threads; they take turns, one
iteration at a time, and the table shows medians. Iterations before `--warm-up` are not counted.

What differs, because it is what is measured: ours drops finished rows and sorts microbatches by length, and keeps fp32 master weights
with bf16. Both generate, score with four models, estimate advantages and take four steps of two optimisers' worth of AdamW. Our config can
be changed on the command line (`policy.attention=eager`); what was changed stands in the result.

    python -m venv peer && peer/bin/pip install torch==2.13.0 trl==1.12.0 "transformers<5.20"
    python benchmarks/against_trl.py --peer peer/bin/python --dtype bfloat16
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from manifest import Manifest, check_alike, spread, write
from rich.console import Console
from rich.table import Table
from turns import Side, ours, take_turns
from workload import Shape, make_rows, save_models, write_job

HERE = Path(__file__).parent


def main(
    peer: Annotated[Path, typer.Option(help="Python of the environment that has TRL")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    ragged: Annotated[bool, typer.Option(help="log-normal lengths, or all of full length")] = True,
    rows: Annotated[int, typer.Option(help="completions of an iteration")] = 32,
    limit: Annotated[int, typer.Option(help="longest completion, in tokens")] = 128,
    repeats: Annotated[int, typer.Option(help="timed iterations of each side")] = 5,
    warm_up: Annotated[int, typer.Option(help="iterations before those")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads of each side")] = 2,
    hidden: Annotated[int, typer.Option(help="hidden size")] = 512,
    layers: Annotated[int, typer.Option(help="layers")] = 8,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value of our config")] = None,
) -> None:
    """Runs both sides in turns and prints a table; the figures go to benchmarks/results/ as JSON."""
    workload: dict[str, Any] = {"dtype": dtype, "ragged": ragged, "rows": rows, "limit": limit, "hidden": hidden, "layers": layers}
    workload |= {"minibatches": 4, "overrides": overrides or []}
    with tempfile.TemporaryDirectory() as temporary:
        folder, work = Path(temporary), make_rows(rows, limit, ragged=ragged)
        job = write_job(folder, save_models(folder, Shape(hidden, layers)), workload, work, iterations=repeats + warm_up, threads=threads)
        sides = {"ours": ours(job, "cpu"), "TRL": Side([str(peer), str(HERE / "peers" / "trl_ppo.py"), str(job)])}
        manifests = {name: side.manifest for name, side in sides.items()}
        check_alike(manifests["ours"], manifests["TRL"])
        measured = take_turns(sides, repeats, warm_up)
    report = summary(measured, workload, manifests["ours"], manifests["TRL"])
    show(report)
    shape = "ragged" if ragged else "full"
    write(f"against_trl_{shape}_{dtype}_r{rows}_t{threads}", report)


def summary(measured: dict[str, list[dict[str, float]]], workload: dict[str, Any], mine: Manifest, theirs: Manifest) -> dict[str, Any]:
    """What is kept: every measurement, medians with their spread, the ratio."""
    phases = {
        side: {phase: asdict(spread([line[phase] for line in lines])) for phase in lines[0] if all(phase in line for line in lines)}
        for side, lines in measured.items()
    }
    ratio = phases["TRL"]["seconds"]["median"] / phases["ours"]["seconds"]["median"]
    return {"ratio": ratio, "seconds": phases, "measured": measured, "ours": asdict(mine), "TRL": asdict(theirs)} | {"workload": workload}


def show(report: dict[str, Any]) -> None:
    """The table a person reads."""
    workload = report["ours"]["workload"]
    title = f"{workload['rows']} completions, {workload['tokens']} tokens, {workload['dtype']}, {report['ours']['threads']} threads"
    table = Table(title=title)
    for column in ("", "iteration, s", "lowest to highest", "generation, s"):
        table.add_column(column, justify="right" if column else "left")
    for side in ("ours", "TRL"):
        seconds = report["seconds"][side]
        total = seconds["seconds"]
        generation = f"{seconds['generate']['median']:.2f}"
        table.add_row(side, f"{total['median']:.2f}", f"{total['low']:.2f} to {total['high']:.2f}", generation)
    table.add_row("ratio", f"{report['ratio']:.2f}", "", "")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
