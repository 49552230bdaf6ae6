"""One PPO iteration beside TRL's PPO trainer: the same models, prompts, forced lengths, minibatches and optimizer steps, on one machine.

Four Llama-shaped models of 41M parameters with random weights (policy, reference, value, reward), 32 prompts of up to 48 tokens,
completions of up to 128: ragged (log-normal, a third of the limit on average) or all of full length; one PPO epoch of four minibatches.
Each side is a process of its own in an environment of its own with the same torch and the same number of threads; they take turns, one
iteration at a time, and the table shows medians. Iterations before `--warm-up` are not counted.

What differs, because it is what is measured: ours drops finished rows and sorts microbatches by length, and keeps fp32 master weights
with bf16. Both generate, score with four models, estimate advantages and take four steps of two optimisers' worth of AdamW. Our config can
be changed on the command line (`policy.attention=eager`); what was changed stands in the result and in the name of its file.

TRL's turn trains on the tokens that ours has sampled in the same round, in the same minibatches. Each side reports what it loaded and what
it did (`likeness.py`): models, settings, prompts, lengths, minibatches, optimizer steps, trained tokens, learning rate; and what came of
it: log-probs, scores, KL, losses, gradient norms. Sides that did not do the same are refused, round by round.

    python -m venv peer && peer/bin/pip install torch==2.13.0 trl==1.12.0 "transformers<5.20"
    python benchmarks/against_trl.py --peer peer/bin/python --dtype bfloat16
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from likeness import TOLERANCES, check_did
from manifest import RESULTS, change_suffix, check_alike, spread, write
from rich.console import Console
from rich.table import Table
from turns import Side, ours, take_turns
from workload import Rounds, Shape, make_rows, save_models, write_job

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
    vocabulary: Annotated[int, typer.Option(help="words of the tokenizer")] = 32000,
    results: Annotated[Path, typer.Option(help="folder of the JSON")] = RESULTS,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value of our config")] = None,
) -> None:
    """Runs both sides in turns and prints a table; the figures go to benchmarks/results/ as JSON."""
    workload: dict[str, Any] = {"dtype": dtype, "ragged": ragged, "rows": rows, "limit": limit, "minibatches": 4}
    workload |= {"hidden": hidden, "layers": layers, "vocabulary": vocabulary, "overrides": overrides or []}
    rounds, work = Rounds(repeats, warm_up), make_rows(rows, limit, ragged=ragged, vocabulary=vocabulary)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job = write_job(folder, save_models(folder, Shape(hidden, layers, vocabulary)), workload, work, rounds=rounds, threads=threads)
        sides = {"ours": ours(job, "cpu"), "TRL": Side([str(peer), str(HERE / "peers" / "trl_ppo.py"), str(job)])}
        measured, done = compare(sides, rounds)
        manifests = {name: asdict(side.manifest) for name, side in sides.items()}
    report = summary(measured) | manifests | {"workload": workload | work.facts(), "done": done}
    show(report)
    shape = "ragged" if ragged else "full"
    write(f"against_trl_{shape}_{dtype}_r{rows}_t{threads}{change_suffix(overrides or [])}", report, results)


def compare(sides: dict[str, Side], rounds: Rounds) -> tuple[dict[str, list[dict[str, float]]], list[dict[str, Any]]]:
    """Measurements of the sides in turns, and what each did in each round (those of the warm-up too).

    Raises:
        ValueError: the sides did not do the same, or there was no round whose results could be compared.
    """
    done: list[dict[str, Any]] = []

    def look() -> None:
        done.append({name: side.read("DID") for name, side in sides.items()})
        done[-1]["compared"] = check_did(done[-1]["ours"], done[-1]["TRL"])

    try:
        check_alike(sides["ours"].manifest, sides["TRL"].manifest)
        measured = take_turns(sides, rounds.repeats, rounds.warm_up, look)
    finally:
        for side in sides.values():
            side.close()
    if not any(each["compared"] for each in done):
        raise ValueError("special tokens were sampled in every round: no results could be compared; take more rounds or more words")
    return measured, done


def summary(measured: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """What is kept: every measurement, medians with their spread, the ratio."""
    phases = {
        side: {phase: asdict(spread([line[phase] for line in lines])) for phase in lines[0] if all(phase in line for line in lines)}
        for side, lines in measured.items()
    }
    ratio = phases["TRL"]["seconds"]["median"] / phases["ours"]["seconds"]["median"]
    rounds = [theirs["seconds"] / mine["seconds"] for mine, theirs in zip(measured["ours"], measured["TRL"], strict=True)]
    return {"ratio": ratio, "ratio_of_rounds": asdict(spread(rounds)), "seconds": phases, "measured": measured}


def show(report: dict[str, Any]) -> None:
    """The table a person reads."""
    workload = report["workload"]
    title = f"{workload['rows']} completions, {workload['tokens']} tokens, {workload['dtype']}, {report['ours']['threads']} threads"
    table = Table(title=title)
    for column in ("", "iteration, s", "lowest to highest", "generation, s"):
        table.add_column(column, justify="right" if column else "left")
    for side in ("ours", "TRL"):
        seconds = report["seconds"][side]
        total = seconds["seconds"]
        generation = f"{seconds['generate']['median']:.2f}"
        table.add_row(side, f"{total['median']:.2f}", f"{total['low']:.2f} to {total['high']:.2f}", generation)
    rounds = report["ratio_of_rounds"]
    table.add_row("ratio, by rounds", f"{rounds['median']:.2f}", f"{rounds['low']:.2f} to {rounds['high']:.2f}", "")
    console = Console()
    console.print(table)
    first = next(each for each in report["done"] if each["compared"])
    mine, theirs = (first[side]["result"] for side in ("ours", "TRL"))
    told = [f"{name} {mine[name]:.4g} and {theirs[name]:.4g}" for name in TOLERANCES if name in mine and name in theirs]
    console.print(
        f"{sum(each['compared'] for each in report['done'])} rounds had like results, ours and TRL's in the first: " + ", ".join(told)
    )


if __name__ == "__main__":
    typer.run(main)
