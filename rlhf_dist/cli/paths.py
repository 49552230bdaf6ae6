"""Paths of a config made absolute, so that they mean the same in every process; hub names are left as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from rlhf_dist.config.errors import UserError

C = TypeVar("C", bound=BaseModel)
FILES, LISTS, MODELS = ("output_dir", "deepspeed", "python"), ("train", "eval"), ("model",)


def with_absolute_paths(config: C, base: Path | None = None) -> C:
    """A copy with absolute paths, in whatever section they stand.

    Args:
        config: as loaded, of any stage.
        base: what relative paths are relative to; the current folder by default.
    """
    base = base or Path.cwd()
    values = config.model_dump()
    for section in values.values():
        _section(section, base)
    return type(config).model_validate(values)


def _section(section: dict[str, Any], base: Path) -> None:
    for key, value in section.items():
        if key in FILES:
            section[key] = _file(value, base)
        elif key in LISTS:
            section[key] = [_file(path, base) for path in value]
        elif key in MODELS and isinstance(value, str):
            section[key] = _model(value, base)
    for source in section.get("sources", ()):
        _source(source, base)


def _file(path: str, base: Path) -> str:
    return str(base / _at_home(path)) if path else path


def _at_home(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError("there is no such user, or the user has no home folder", where=path, fix="write the path out") from None


def _model(name: str, base: Path) -> str:
    """A folder becomes absolute; what is no folder may be a hub name."""
    path = base / _at_home(name)
    return str(path) if name and path.is_dir() else name


def _source(source: dict[str, Any], base: Path) -> None:
    if source["kind"] == "model":
        source["model"] = _model(source["model"], base)
        return
    module, separator, function = source.get("path", "").rpartition(":")  # an endpoint has none
    if separator and module.endswith(".py"):
        source["path"] = f"{_file(module, base)}:{function}"
