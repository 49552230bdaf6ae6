"""Seconds and GB/s of a weight sync from a policy rank to a rollout rank, each a Ray actor on this machine, by every transport.

What is timed is the whole sync as the coordinator sees it: export, transport, loading, and the checksums of both sides. The transports
take turns within each repeat, after untimed ones in which the links are opened; the table shows medians and their range. `copies` is what
one process needs to copy the same bytes once, for scale.

    python benchmarks/weight_sync.py                                      # random weights, 41M parameters
    python benchmarks/weight_sync.py --model path/to/model --bucket-mib 8
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from manifest import RESULTS, Spread, manifest, spread, write
from rich.console import Console
from rich.table import Table
from workload import Shape, save_models

from rlhf_dist.cli.programs import PPOProgram
from rlhf_dist.cli.ray_launch import cluster, ray_groups
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.coordinator.shards import Groups
from rlhf_dist.coordinator.sync import BUCKET_BYTES, WeightSync
from rlhf_dist.models.quiet import quiet_libraries
from rlhf_dist.workers.placement import Demand

TRANSPORTS = ("ipc", "broadcast", "object_store")
MIB, GB = 2**20, 1e9


class TwoGroups(PPOProgram):
    """A run's policy and rollout groups alone."""

    def demands(self) -> list[Demand]:
        """The two."""
        return [demand for demand in super().demands() if demand.role in ("policy", "rollout")]


def main(
    model: Annotated[str, typer.Option(help="model folder; empty: a random Llama of --hidden and --layers")] = "",
    hidden: Annotated[int, typer.Option(help="hidden size of the random model")] = 512,
    layers: Annotated[int, typer.Option(help="layers of the random model")] = 8,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    bucket_mib: Annotated[float, typer.Option(help="cap of a bucket")] = BUCKET_BYTES / MIB,
    repeats: Annotated[int, typer.Option(help="timed syncs by each transport")] = 5,
    warm_up: Annotated[int, typer.Option(help="untimed ones before them")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads of each rank")] = 1,
    results: Annotated[Path, typer.Option(help="folder of the JSON")] = RESULTS,
) -> None:
    """Measures, prints a table and writes JSON."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        path = model or save_models(Path(folder), Shape(hidden, layers), scorer=False)[0]
        config = config_of(Path(folder), path, dtype, threads)
        demands = TwoGroups(config).demands()
        with cluster(demands), ray_groups(TwoGroups(config)) as by_role:
            groups = Groups(reward=None, **by_role)  # type: ignore[arg-type]
            seconds, moved = measure(config, groups, int(bucket_mib * MIB), repeats, warm_up)
    name = Path(model).name if model else f"llama{hidden}x{layers}"
    workload = {
        "model": name,
        "bytes": moved["bytes"],
        "buckets": moved["buckets"],
        "dtype": dtype,
        "bucket_mib": bucket_mib,
        "ranks": [1, 1],
    }
    report = {
        "manifest": asdict(manifest("weight_sync", workload, threads, "cpu", warm_up=warm_up, repeats=repeats)),
        "seconds": {transport: asdict(spread(values)) for transport, values in seconds.items()},
        "gb_per_second": {transport: asdict(rate(values, moved["bytes"])) for transport, values in seconds.items()},
    }
    show(report, seconds)
    write(f"weight_sync_{name}_{dtype}_t{threads}", report, results)


def config_of(folder: Path, model: str, dtype: str, threads: int) -> PPOConfig:
    """A run whose policy and rollout group have a rank each; nothing is ever sampled."""
    (folder / "prompts.jsonl").write_text('{"prompt": "t3"}\n', encoding="utf-8")
    values: dict[str, Any] = {
        "data": {"train": str(folder / "prompts.jsonl")},
        "policy": {"model": model, "dtype": dtype},
        "reward": {"sources": [{"name": "none", "kind": "function", "path": "none.py:none"}]},
        "rollout": {"ranks": 1},
        "placement": {"threads_per_rank": threads},
    }
    return PPOConfig.model_validate(values)


def measure(
    config: PPOConfig, groups: Groups, bucket_bytes: int, repeats: int, warm_up: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every sync by transport, and what one moves. The checksum of all must be one.

    A policy has one link open at a time: at its turn each transport opens its own, with a sync that is not timed.
    """
    seconds: dict[str, list[float]] = {transport: [] for transport in ("copies", *TRANSPORTS)}
    moved: dict[str, int] = {}
    sums = set()
    for repeat in range(warm_up + repeats):
        for transport in TRANSPORTS:
            sync = WeightSync(wishing(config, transport), groups, bucket_bytes)
            sync(repeat)
            metrics = sync(repeat)
            sums.add(metrics["weight_sync/checksum"])
            moved = {name: int(metrics[f"weight_sync/{name}"]) for name in ("bytes", "buckets")}
            if repeat >= warm_up:
                seconds[transport].append(metrics["weight_sync/seconds"])
        if repeat >= warm_up:
            seconds["copies"].append(copy_seconds(moved["bytes"]))
    assert len(sums) == 1, "all syncs moved the same weights"
    return seconds, moved


def wishing(config: PPOConfig, transport: str) -> PPOConfig:
    """The config with a transport."""
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"weight_sync": transport})})


def copy_seconds(size: int) -> float:
    """One copy of so many bytes in this process."""
    import torch

    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    began = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - began


def rate(seconds: list[float], size: int) -> Spread:
    """GB/s of each sync."""
    return spread([size / GB / each for each in seconds])


def show(report: dict[str, Any], seconds: dict[str, list[float]]) -> None:
    """The table."""
    work = report["manifest"]["workload"]
    table = Table(title=f"{work['model']}, {work['bytes'] / MIB:.0f} MiB in {work['buckets']} buckets, {work['dtype']}")
    for column in ("transport", "seconds", "GB/s"):
        table.add_column(column)
    for transport, values in seconds.items():
        table.add_row(transport, spread(values).text(3), rate(values, work["bytes"]).text())
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
