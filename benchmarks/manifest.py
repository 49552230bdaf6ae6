"""What every benchmark writes beside its figures, so that only like is compared with like."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "deepspeed", "ray", "peft", "bitsandbytes", "trl", "vllm")
LONGEST_SUFFIX = 180
MUST_AGREE = ("workload", "machine", "threads", "device", "torch", "warm_up")


@dataclass(frozen=True)
class Manifest:
    """One side of a measurement.

    workload: everything that says how much work there is: models, lengths, precision. versions: of the packages of this side's
    environment. warm_up, repeats: measurements that were thrown away, and that were kept. settings: how this side does the work, where
    sides may differ because that is what is measured.
    """

    side: str
    workload: dict[str, Any]
    machine: str
    threads: int
    device: str
    torch: str
    versions: dict[str, str]
    warm_up: int = 0
    repeats: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


def manifest(side: str, workload: Mapping[str, Any], threads: int, device: str, *, warm_up: int = 0, repeats: int = 0) -> Manifest:
    """The manifest of this process."""
    versions = {"python": platform.python_version()} | {name: found for name in PACKAGES if (found := _version(name))}
    machine = _machine() if device == "cpu" else f"{_machine()}, {_gpu()}"
    return Manifest(side, dict(workload), machine, threads, device, versions.get("torch", ""), versions, warm_up, repeats)


def check_alike(one: Manifest, other: Manifest) -> None:
    """Refuses to compare what cannot be compared.

    Raises:
        ValueError: work, machine, threads, device, warm-up or the version of torch differ.
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

    def text(self, digits: int = 2) -> str:
        """For a table: `12.60 (12.38 to 14.21)`; a single measurement has no range."""
        if self.count == 1:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    """Of one measurement repeated."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def write(name: str, report: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Keeps a report, by default under benchmarks/results/."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path


def change_suffix(overrides: Sequence[str]) -> str:
    """What `key.path=value` changes add to the name of a report, so that no run overwrites another's; empty without any.

    Changes too long for the name of a file are told apart by a hash; the report itself holds them.
    """
    text = "".join("_" + re.sub(r"[^\w.=-]+", "-", change) for change in overrides)
    if len(text) <= LONGEST_SUFFIX:
        return text
    return f"_{len(overrides)}-changes-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


def _gpu() -> str:
    import torch

    return str(torch.cuda.get_device_name())


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
