"""Which settings may change when a run goes on, and which would make it another run."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.yaml_text import read_yaml

CONFIG = "config.yaml"
FREE = (
    "run.name", "run.output_dir", "run.overwrite", "run.resume",
    "*.ranks", "*.cpus_per_rank", "*.gpus_per_rank", "*.deepspeed", "*.microbatch_tokens", "*.packing", "*.attention",
    "*.gradient_checkpointing", "*.trust_remote_code",
    "placement.*", "checkpoint.*", "sentinels.*", "training.max_skipped", "training.capsules",
    "rollout.slots", "rollout.shards_per_rank", "rollout.weight_sync", "rollout.python",
    "reward.sources.*.timeout_s", "reward.sources.*.retries", "reward.sources.*.url", "reward.sources.*.concurrency",
    "reward.sources.*.start_timeout_s", "reward.sources.*.auth_env",
)  # fmt: skip
"""Where the work is done and how it is cut (law 2), how the run is kept: none of it changes what is computed, up to rounding."""
ROUNDING = ("placement.threads_per_rank", "*.ranks", "*.deepspeed", "*.microbatch_tokens", "*.packing", "*.attention")
"""Of these, those by which sums are taken in another order: the run goes on, but not bit for bit."""
WEIGHT_KEYS = ("policy.", "rollout.", "placement.threads_per_rank:")
"""How what `changed_keys` says begins where the weights that the sampler holds may come out with other bits."""


def changed_keys(folder: Path, config: BaseModel) -> list[str]:
    """The settings that differ from those a checkpoint was taken with, as `key: old, now new`.

    Args:
        folder: of the checkpoint. config: of the run that goes on.

    Raises:
        UserError: the saved config cannot be read.
    """
    try:
        saved = dict(_leaves(read_yaml((folder / CONFIG).read_text(encoding="utf-8"))))
    except (OSError, ValueError) as error:
        raise UserError(f"{CONFIG} cannot be read: {type(error).__name__}", where=str(folder), fix="use another checkpoint") from None
    now = dict(_leaves(config.model_dump(mode="json")))
    keys = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    return [f"{key}: {saved.get(key)!r}, now {now.get(key)!r}" for key in keys]


def check_same_run(folder: Path, config: BaseModel) -> list[str]:
    """Holds the settings of a run that goes on to those of its checkpoint; returns what changed and may.

    Raises:
        UserError: a setting changed that decides what is computed.
    """
    changed = changed_keys(folder, config)
    other = [each for each in changed if not _matches(each, FREE)]
    if other:
        fix = "set it back, or start a new run (run.name=…)"
        raise UserError("the run cannot go on with other settings: " + "; ".join(other[:5]), where=str(folder), fix=fix)
    return [f"{each} (the run goes on up to rounding)" if _matches(each, ROUNDING) else each for each in changed]


def _matches(change: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(change.split(":", 1)[0], pattern) for pattern in patterns)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if inner is None or not value:
        yield key, value
        return
    for name, each in inner:
        yield from _leaves(each, f"{key}.{name}" if key else str(name))
