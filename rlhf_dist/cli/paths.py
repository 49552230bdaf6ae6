"""Paths of a config made absolute, so that they mean the same in every process; hub names are left as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_dist.config.ppo import PPOConfig


def with_absolute_paths(config: PPOConfig, base: Path | None = None) -> PPOConfig:
    """A copy with absolute paths.

    Args:
        config: as loaded.
        base: what relative paths are relative to; the current folder by default.
    """
    base = base or Path.cwd()
    values = config.model_dump()
    values["run"]["output_dir"] = _file(values["run"]["output_dir"], base)
    for split in ("train", "eval"):
        values["data"][split] = [_file(path, base) for path in values["data"][split]]
    for role in ("policy", "reference", "value", "reward"):
        section = values[role]
        section["deepspeed"] = _file(section["deepspeed"], base)
        if "model" in section:
            section["model"] = _model(section["model"], base)
    for source in values["reward"]["sources"]:
        _source(source, base)
    return PPOConfig.model_validate(values)


def _file(path: str, base: Path) -> str:
    return str(base / Path(path).expanduser()) if path else path


def _model(name: str, base: Path) -> str:
    """A folder becomes absolute; what is no folder may be a hub name."""
    path = base / Path(name).expanduser()
    return str(path) if name and path.is_dir() else name


def _source(source: dict[str, Any], base: Path) -> None:
    if source["kind"] == "model":
        source["model"] = _model(source["model"], base)
        return
    module, separator, function = source["path"].rpartition(":")
    if separator and module.endswith(".py"):
        source["path"] = f"{_file(module, base)}:{function}"
