"""`summary.json`: what came out of a run, with what it was made."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf_dist import __version__
from rlhf_dist.config.errors import UserError
from rlhf_dist.runs.atomic import write_text

PACKAGES = ("torch", "transformers", "deepspeed", "ray", "peft", "pyarrow")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide the numbers; None for one that is not installed. Imports none of them."""
    return {"python": platform.python_version(), "rlhf_dist": __version__} | {name: _version(name) for name in PACKAGES}


@dataclass(frozen=True)
class HeldOut:
    """Held-out evaluations as JSON-able dicts (reward, its parts, KL, length, with 95 % intervals).

    difference: after minus before, paired by prompt and sample. best_score at best_step: the best evaluation of the run.
    """

    before: dict[str, Any]
    after: dict[str, Any]
    difference: dict[str, Any] | None = None
    best_score: float | None = None
    best_step: int | None = None


@dataclass(frozen=True)
class Summary:
    """A finished run.

    kl: nats per sequence over the last step's samples. tokens_per_second: by phase, response tokens over that phase's seconds.
    dropped: samples left out, by reason. seconds: wall time by phase. held_out: None when the run had no held-out prompts.
    """

    name: str
    seed: int
    config_sha256: str
    steps: int
    optimizer_steps: int
    wall_seconds: float
    kl: float | None = None
    held_out: HeldOut | None = None
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=versions)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self)


def config_hash(text: str) -> str:
    """SHA-256 of a resolved config, as hexadecimal: equal configs, equal hash."""
    return hashlib.sha256(text.encode()).hexdigest()


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Writes the summary atomically, indented.

    Raises:
        UserError: a figure is NaN or infinite (named by its key).
        TypeError: something in it is not JSON-able.
    """
    for key, value in _leaves(summary, ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"summary figure {key} is {value}", where=str(path), fix="look at metrics.jsonl for the step where it began")
    write_text(path, json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def headline(summary: Mapping[str, Any]) -> list[str]:
    """The main figures as a few lines of text; what a summary lacks is left out."""
    lines = []
    if "wall_seconds" in summary:
        lines.append(f"finished {summary.get('steps')} steps in {summary['wall_seconds']:.1f} s")
    held_out = summary.get("held_out")
    if held_out:
        lines.append(f"held-out reward {_interval(held_out['before']['score'])} -> {_interval(held_out['after']['score'])}")
    if summary.get("kl") is not None:
        lines.append(f"kl per sequence {summary['kl']:.2f} nats")
    if summary.get("best"):
        lines.append(f"best on held-out rows: step {summary['best_step']}: {summary['best']}")
    if summary.get("dropped"):
        lines.append("dropped samples: " + ", ".join(f"{count} {reason}" for reason, count in summary["dropped"].items()))
    return lines


def _interval(mean: Mapping[str, Any]) -> str:
    text = f"{mean['mean']:.3f}"
    return text if mean.get("low") is None else f"{text} [{mean['low']:.3f}, {mean['high']:.3f}]"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{key}.{index}")
    else:
        yield key, value
