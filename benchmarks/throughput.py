"""Seconds and tokens a second of a PPO run, by phase and by device, for any config, through the launcher that the config names.

The run is the real program; only its number of steps, its folder and its evaluations are set here, and what the command line says wins over
that too. Seconds by phase are those that the run itself records: wall time as its coordinator waited, so phases that overlap count to the
one that was waited for (`_worked`: by the clocks of the workers instead). Tokens are sampled response tokens.

Beside them stands the coordinator's own share of an iteration: the part in which no worker of any role was busy (`busy.py`), from the first
phase of a step until its metrics are written. At most 1 % is asked for.

    python benchmarks/throughput.py --config configs/recipes/quickstart/ppo.yaml rollout.max_new_tokens=64
    deepspeed --num_gpus 8 benchmarks/throughput.py --config my.yaml placement.launcher=spmd
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from busy import FILE, idle_shares, watching
from manifest import RESULTS, Manifest, Spread, change_suffix, manifest, spread, write
from measuring import here
from rich.console import Console
from rich.table import Table

ALLOWED, WIDTH = 0.01, 130


def main(
    config: Annotated[Path, typer.Option("--config", "-c", help="YAML file of rlhf-dist ppo")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value; wins over the file")] = None,
    steps: Annotated[int, typer.Option(help="iterations that count")] = 5,
    warm_up: Annotated[int, typer.Option(help="iterations before those")] = 1,
    results: Annotated[Path, typer.Option(help="folder of the JSON")] = RESULTS,
) -> None:
    """Runs the config and prints a table; the figures go to benchmarks/results/ as JSON."""
    from rlhf_dist.cli.launching import launch
    from rlhf_dist.cli.paths import with_absolute_paths
    from rlhf_dist.config.loading import load_config
    from rlhf_dist.config.ppo import PPOConfig

    with tempfile.TemporaryDirectory() as temporary:
        ours = [
            f"run.steps={steps + warm_up}",
            f"run.output_dir={temporary}",
            "run.name=throughput",
            "evaluation.every=0",
            "checkpoint.every=0",
        ]
        resolved = with_absolute_paths(load_config(PPOConfig, config, ours + (overrides or [])))
        with watching():
            root, first = launch(resolved)
        if not first:
            return
        report = read_run(root, warm_up, devices(resolved))
    facts = facts_of(config, resolved, warm_up, len(report["measured"]))
    show(report, f"{config.name}, {resolved.placement.launcher}")
    changes = change_suffix([change for change in overrides or [] if not change.startswith("placement.launcher=")])
    name = f"throughput_{config.stem}_{facts.device}_{resolved.placement.launcher}{changes}"
    write(name, report | {"manifest": asdict(facts)}, results)


def read_run(root: Path, warm_up: int, devices: int) -> dict[str, Any]:
    """What the run recorded: of each phase seconds, tokens a second and tokens a second and device, with their spread.

    Raises:
        SystemExit: no iteration is left after those of the warm-up.
    """
    from rlhf_dist.runs.metrics import read_metrics

    lines = [line for line in read_metrics(root / "metrics.jsonl") if line["step"] > warm_up]
    if not lines:
        raise SystemExit(f"the run had no iteration after the {warm_up} of the warm-up")
    watched = json.loads((root / FILE).read_text(encoding="utf-8"))
    shares = idle_shares(watched["iterations"], watched["busy"])[warm_up:]
    walls = [ended - began for began, ended in watched["iterations"]][warm_up:]
    phases = sorted((name[len("perf/") : -len("_seconds")] for name in lines[0] if name.endswith("_seconds")), key="step".__eq__)
    measured = [{phase: line[f"perf/{phase}_seconds"] for phase in phases} for line in lines]
    tokens = [line["perf/tokens_per_second"] * line["perf/step_seconds"] for line in lines]
    rates = {phase: spread([count / line[phase] for count, line in zip(tokens, measured, strict=True)]) for phase in phases}
    return {
        "devices": devices,
        "tokens": asdict(spread(tokens)),
        "seconds": {phase: asdict(spread([line[phase] for line in measured])) for phase in phases},
        "tokens_per_second": {phase: asdict(rate) for phase, rate in rates.items()},
        "tokens_per_second_and_device": {phase: rate.median / devices for phase, rate in rates.items()},
        "wall_seconds": asdict(spread(walls)),
        "coordinator_share": asdict(spread(shares)),
        "coordinator_seconds": asdict(spread([share * wall for share, wall in zip(shares, walls, strict=True)])),
        "measured": measured,
    }


def devices(config: Any) -> int:
    """GPUs that the run uses, or CPU cores where it has none."""
    from rlhf_dist.cli.programs import program_of
    from rlhf_dist.engines.process import launched_world_size

    ranks, wanted = launched_world_size() or 1, program_of(config).demands()
    if here() == "cuda":
        return ranks if config.placement.launcher == "spmd" else math.ceil(sum(demand.gpus * demand.ranks for demand in wanted)) or 1
    processes = ranks if config.placement.launcher == "spmd" else sum(demand.ranks for demand in wanted)
    return min(processes * config.placement.threads_per_rank, os.cpu_count() or 1)


def facts_of(path: Path, config: Any, warm_up: int, repeats: int) -> Manifest:
    """The manifest: the whole config is the workload, but for where the run wrote."""
    values: Mapping[str, Any] = config.model_dump(mode="json")
    values = {name: section for name, section in values.items() if name != "run"} | {"seed": config.run.seed}
    workload = {"file": path.name, "config": values}
    return manifest("ours", workload, config.placement.threads_per_rank, here(), warm_up=warm_up, repeats=repeats)


def show(report: dict[str, Any], title: str) -> None:
    """The table a person reads."""
    table = Table(title=f"{title}, {report['tokens']['median']:.0f} response tokens an iteration, {report['devices']} device(s)")
    for column in ("", "seconds", "tokens/s", "tokens/s and device"):
        table.add_column(column, justify="right" if column else "left")
    for phase, seconds in report["seconds"].items():
        cells = (Spread(**seconds).text(3), Spread(**report["tokens_per_second"][phase]).text(0))
        table.add_row("iteration" if phase == "step" else phase, *cells, f"{report['tokens_per_second_and_device'][phase]:.0f}")
    console, share = Console(width=WIDTH), {name: 100 * value for name, value in report["coordinator_share"].items() if name != "count"}
    console.print(table)
    text = Spread(**share, count=report["coordinator_share"]["count"]).text(2)
    alone = Spread(**report["coordinator_seconds"]).text(3)
    console.print(f"no worker busy: {text} % of an iteration, {alone} s; at most {ALLOWED:.0%} is asked for")


if __name__ == "__main__":
    typer.run(main)
