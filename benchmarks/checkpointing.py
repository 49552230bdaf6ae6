"""What a checkpoint costs a run: without any, with training that waits for the files, with training that goes on meanwhile.

PPO in one plain process, policy and value of `--hidden`/`--layers`, the same steps three times in turn. Printed and kept: seconds of a step
(all phases and the stall), the stall alone (`perf/checkpoint_stall_seconds`, of the checkpoint before the step), bytes of a checkpoint, and
the seconds to go on from one.

    python benchmarks/checkpointing.py
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from manifest import RESULTS, manifest, spread, write
from rich.console import Console
from rich.table import Table
from workload import Rounds, Shape, make_rows, save_models, write_config, write_job

WAYS = {
    "none": ["checkpoint.every=0"],
    "synchronous": ["checkpoint.every=1", "checkpoint.asynchronous=false"],
    "asynchronous": ["checkpoint.every=1"],
}


def main(
    repeats: Annotated[int, typer.Option(help="timed steps of each way, a checkpoint before each")] = 5,
    rows: Annotated[int, typer.Option(help="completions of a step")] = 16,
    limit: Annotated[int, typer.Option(help="longest completion, in tokens")] = 64,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
    hidden: Annotated[int, typer.Option(help="hidden size")] = 512,
    layers: Annotated[int, typer.Option(help="layers")] = 8,
    results: Annotated[Path, typer.Option(help="folder of the JSON")] = RESULTS,
) -> None:
    """Runs each way, prints a table, keeps the figures."""
    work: dict[str, Any] = {"dtype": "float32", "minibatches": 2, "hidden": hidden, "layers": layers}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = save_models(folder, Shape(hidden, layers))
        job = write_job(folder, models, work, make_rows(rows, limit, ragged=False), rounds=Rounds(repeats, 2), threads=threads)
        config = write_config(json.loads(job.read_text(encoding="utf-8")))
        measured = {way: _run(config, way, overrides, repeats) for way, overrides in WAYS.items()}
        resumed = _resume(config, repeats)
    report = {
        "manifest": asdict(manifest("checkpointing", work | {"rows": rows, "limit": limit}, threads, "cpu", warm_up=2, repeats=repeats))
    }
    report |= {"ways": measured, "resume_seconds": resumed}
    Console(width=110).print(_table(measured))
    Console().print(f"going on from a checkpoint: {resumed:.2f} s")
    Console().print(f"kept in {write('checkpointing', report, results)}", soft_wrap=True)


def _run(config: Path, way: str, overrides: list[str], repeats: int) -> dict[str, Any]:
    from rlhf_dist.runs.metrics import read_metrics

    root = _launched(config, [f"run.name={way}", *overrides])
    lines = read_metrics(root / "metrics.jsonl")
    ends = [line["time"] for line in lines]
    checkpoints = sorted((root / "checkpoints").glob("step_*"))
    size = sum(path.stat().st_size for path in checkpoints[-1].rglob("*") if path.is_file()) if checkpoints else 0
    return {
        "step_seconds": [later - earlier for earlier, later in zip(ends[-repeats - 1 :], ends[-repeats:], strict=False)],
        "stall_seconds": [line.get("perf/checkpoint_stall_seconds", 0.0) for line in lines[-repeats:]],
        "bytes": size,
    }


def _resume(config: Path, repeats: int) -> float:
    """Seconds that a run spends on taking up its newest checkpoint, as it says itself."""
    root = config.parent / "synchronous"
    (root / "summary.json").unlink()
    began = time.perf_counter()
    _launched(config, ["run.name=synchronous", *WAYS["synchronous"], "run.resume=auto"])
    return time.perf_counter() - began


def _launched(config: Path, overrides: list[str]) -> Path:
    from rlhf_dist.cli.launching import launch
    from rlhf_dist.cli.paths import with_absolute_paths
    from rlhf_dist.config.loading import load_config
    from rlhf_dist.config.ppo import PPOConfig

    return launch(with_absolute_paths(load_config(PPOConfig, config, overrides)))[0]


def _table(measured: dict[str, Any]) -> Table:
    table = Table("checkpoints", "seconds of a step", "stall", "MiB")
    for way, seen in measured.items():
        table.add_row(way, spread(seen["step_seconds"]).text(2), spread(seen["stall_seconds"]).text(3), f"{seen['bytes'] / 2**20:.0f}")
    return table


if __name__ == "__main__":
    typer.run(main)
