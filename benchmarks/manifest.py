"""What every benchmark writes beside its figures, so that only like is compared with like."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "deepspeed", "ray", "peft")
MUST_AGREE = ("workload", "machine", "threads", "device", "torch")


@dataclass(frozen=True)
class Manifest:
    """One side of a measurement.

    workload: everything that says how much work there is. versions: of the packages of this side's environment.
    """

    side: str
    workload: dict[str, Any]
    machine: str
    threads: int
    device: str
    torch: str
    versions: dict[str, str]


def manifest(side: str, workload: Mapping[str, Any], threads: int, device: str) -> Manifest:
    """The manifest of this process."""
    versions = {"python": platform.python_version()} | {name: found for name in PACKAGES if (found := _version(name))}
    return Manifest(side, dict(workload), _machine(), threads, device, versions.get("torch", ""), versions)


def check_alike(one: Manifest, other: Manifest) -> None:
    """Refuses to compare what cannot be compared.

    Raises:
        ValueError: work, machine, threads, device or the version of torch differ.
    """
    mine, theirs = asdict(one), asdict(other)
    for name in MUST_AGREE:
        if mine[name] != theirs[name]:
            raise ValueError(f"{one.side} and {other.side} cannot be compared: {name} is {mine[name]!r} here and {theirs[name]!r} there")


@dataclass(frozen=True)
class Spread:
    """Median of repeated measurements, with the lowest and the highest."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Of one measurement repeated."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def write(name: str, report: Mapping[str, Any]) -> Path:
    """Keeps a report under benchmarks/results/."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path


def _machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
