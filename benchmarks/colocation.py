"""Peak memory of PPO with all four engines in one process: engines that stay (`placement.offload: none`) against engines that take turns.

Each run is a process of its own: random Llamas of one shape for policy, reference, value and reward, no ZeRO, prompts and forced lengths as
in the other benchmarks. `held` is what the four engines would take together, and `largest` what the largest phase needs, by arithmetic:
weights, gradients and both moments of AdamW; activations, caches and repacked weights come on top of either. The figures are above what the
process held before it loaded a model: resident memory on a CPU (Linux), what torch allocated on a GPU.

    python benchmarks/colocation.py
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from manifest import RESULTS, Spread, manifest, spread, write
from measuring import GIVES_BACK, MIB, held, here, in_a_process, peak
from rich.console import Console
from rich.table import Table
from workload import Rounds, Shape, make_rows, save_models, write_config, write_job

WAYS = ("none", "idle")
FIGURES = ("load", "run", "step_seconds", "offload_seconds", "resting")
TRAINED = 4
"""Copies of the weights that a trained model takes in fp32: itself, gradients, two moments."""


def main(
    rows: Annotated[int, typer.Option(help="completions of an iteration")] = 16,
    limit: Annotated[int, typer.Option(help="longest completion, in tokens")] = 32,
    hidden: Annotated[int, typer.Option(help="hidden size")] = 512,
    layers: Annotated[int, typer.Option(help="layers")] = 8,
    vocabulary: Annotated[int, typer.Option(help="words")] = 32000,
    steps: Annotated[int, typer.Option(help="iterations of a run")] = 3,
    repeats: Annotated[int, typer.Option(help="processes of each way, in turns")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    results: Annotated[Path, typer.Option(help="folder of the JSON")] = RESULTS,
    job: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Runs both ways and prints a table; the figures go to benchmarks/results/ as JSON."""
    if job:
        print(json.dumps(measure(json.loads(job))))
        return
    shape, found = Shape(hidden, layers, vocabulary), {way: list[dict[str, float]]() for way in WAYS}
    work = make_rows(rows, limit, vocabulary=vocabulary)
    workload: dict[str, Any] = {"dtype": "float32", "minibatches": 2}
    with tempfile.TemporaryDirectory() as temporary:
        models = save_models(Path(temporary), shape)
        for number in range(repeats):
            for way in WAYS:
                changes = workload | {"overrides": [f"placement.offload={way}"]}
                path = write_job(Path(temporary) / f"{way}{number}", models, changes, work, rounds=Rounds(steps), threads=threads)
                found[way].append(in_a_process(__file__, {"path": str(path)}, threads, GIVES_BACK))
    once = found[WAYS[0]][0]["weights"]
    arithmetic = {"held": 2 * TRAINED * once + 2 * once, "largest": TRAINED * once}
    spreads = {way: {name: asdict(spread([line[name] for line in lines])) for name in FIGURES} for way, lines in found.items()}
    report = {"mib": arithmetic, "found": spreads, "measured": found}
    show(report, f"MiB, four engines of {once:.0f} MiB, {here()}, {threads} thread(s)")
    facts = manifest("ours", workload | work.facts() | asdict(shape) | {"ways": WAYS}, threads, here(), repeats=repeats)
    write(f"colocation_llama{hidden}x{layers}_{here()}_fp32_t{threads}", report | {"manifest": asdict(facts)}, results)


def measure(job: dict[str, Any]) -> dict[str, float]:
    """One run in this process; MiB above what it held before it loaded a model, and seconds of a later iteration."""
    import torch

    from rlhf_dist.cli.programs import program_of
    from rlhf_dist.cli.spmd_launch import spmd_groups
    from rlhf_dist.config.loading import load_config
    from rlhf_dist.config.ppo import PPOConfig
    from rlhf_dist.contracts.roles import PolicyRole
    from rlhf_dist.engines.process import free_port, start_process_group, stop_process_group
    from rlhf_dist.runs.folder import RunFolder
    from rlhf_dist.runs.metrics import read_metrics
    from rlhf_dist.runs.progress import NullReporter
    from rlhf_dist.runs.recorder import Recorder

    given = json.loads(Path(job["path"]).read_text())
    torch.set_num_threads(given["threads"])
    rank = start_process_group(0, 1, 0, "127.0.0.1", free_port())
    program = program_of(load_config(PPOConfig, write_config(given), given["overrides"]))
    peak(rank.device, reset=True)
    before = held(rank.device)
    with spmd_groups(program, rank) as groups:
        loaded = peak(rank.device, reset=True) - before
        policy = groups["policy"]
        weights = policy.collect(policy.submit(PolicyRole.describe, [()]))[0]["parameters"] * 4 / MIB
        folder = RunFolder.create(given["folder"], "run")
        program.run(groups, Recorder(folder), NullReporter())
        most = peak(rank.device) - before
    stop_process_group()
    last = read_metrics(folder.root / "metrics.jsonl")[-1]
    away = {"offload_seconds": last.get("offload/seconds", 0.0), "resting": last.get("offload/bytes", 0.0) / MIB}
    return {"load": loaded, "run": most, "weights": weights, "step_seconds": last["perf/step_seconds"]} | away


def show(report: dict[str, Any], title: str) -> None:
    """The table a person reads."""
    table = Table(title=title)
    for column in ("placement.offload", "peak while loading", "peak of the run", "off the device at most", "s/step", "of it offload"):
        table.add_column(column, justify="right")
    for way, found in report["found"].items():
        cells = [Spread(**found[name]).text(digits) for name, digits in zip(("load", "run", "resting"), (0, 0, 0), strict=True)]
        table.add_row(way, *cells, *(Spread(**found[name]).text(2) for name in ("step_seconds", "offload_seconds")))
    Console(width=130).print(table)
    arithmetic = report["mib"]
    Console().print(f"by arithmetic: all engines {arithmetic['held']:.0f} MiB, the largest phase {arithmetic['largest']:.0f} MiB")


if __name__ == "__main__":
    typer.run(main)
