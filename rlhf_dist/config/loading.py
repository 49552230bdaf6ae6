"""YAML and `key.path=value` into a typed config; a typo is an error that names the nearest key."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.yaml_text import read_yaml

C = TypeVar("C", bound=BaseModel)


def load_config(kind: type[C], path: str | Path | None, overrides: Sequence[str] = ()) -> C:
    """Reads a YAML file, applies the overrides, validates.

    Args:
        kind: the root model, for example `PPOConfig`.
        path: YAML file; None starts from nothing.
        overrides: `key.path=value`; the value is YAML, the key may index lists (`reward.sources.0.weight=2`). Nothing behind the `=` is
            the empty text for a key that takes text, otherwise null.

    Raises:
        UserError: unreadable file, unknown key (with the nearest name), wrong type or range.
    """
    values = read_values(path, overrides, kind)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(
            "the configuration is not valid:\n" + "\n".join(f"  - {_explain(kind, e)}" for e in error.errors()),
            where=str(path) if path is not None else "command line",
            fix="correct the keys above; `rlhf-dist config show` prints every key with its default",
        ) from None


def read_values(path: str | Path | None, overrides: Sequence[str] = (), kind: type[BaseModel] | None = None) -> dict[str, Any]:
    """What file and overrides say, not yet validated.

    Args:
        kind: the root model, where it is known: it tells which keys take text.

    Raises:
        UserError: unreadable file, or an override that fits nowhere.
    """
    values = _read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        _apply(values, override, kind)
    return values


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read the config file: {error.strerror}", where=str(path), fix="pass --config a YAML file that exists"
        ) from None
    except ValueError as error:
        raise UserError(f"the config file is not YAML: {error}", where=str(path), fix="mend the syntax") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError("the config file must hold a mapping of sections", where=str(path), fix="start from a file in configs/recipes/")
    return values


def _apply(values: dict[str, Any], override: str, kind: type[BaseModel] | None) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"not an override: {override!r}", where="command line", fix="write key.path=value, for example run.steps=10")
    try:
        value = "" if not text.strip() and _takes_text(kind, key) else _number(read_yaml(text))
    except ValueError:
        raise UserError(f"the value of {key} is not YAML: {text!r}", where="command line", fix="quote it") from None
    node: Any = values
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        node = _descend(node, part, ".".join(parents[: depth + 1]))
    _put(node, last, value, key)


def _takes_text(kind: type[BaseModel] | None, key: str) -> bool:
    """Whether text, and not null, may stand at the key."""
    *parents, last = key.split(".")
    kinds = [] if kind is None else _walk(kind, parents)[0]
    return any(last in each.model_fields and each.model_fields[last].annotation is str for each in kinds)


def _number(value: Any) -> Any:
    """YAML reads `1e-5` as text (it wants `1.0e-5`); people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _descend(node: Any, part: str, so_far: str) -> Any:
    key: Any = _index(node, part, so_far) if isinstance(node, list) else part
    if isinstance(node, dict) and node.get(part) is None:
        node[part] = {}
    if not isinstance(node[key], dict | list):
        raise UserError(f"{so_far} is a value, not a section", where="command line", fix="drop what follows it")
    return node[key]


def _put(node: Any, last: str, value: Any, key: str) -> None:
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def _index(node: list[Any], part: str, so_far: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise UserError(
            f"{so_far}: the list has {len(node)} entries, so {part!r} names none", where="command line", fix="use 0 for the first entry"
        )
    return int(part)


def _explain(kind: type[BaseModel], error: Any) -> str:
    kinds, written = _walk(kind, error["loc"][:-1])
    last = [str(part) for part in error["loc"][-1:]]
    path = ".".join(written + last) or "(whole file)"
    if error["type"] != "extra_forbidden":
        return f"{path}: {error['msg'].removeprefix('Value error, ')}"
    names = sorted({name for k in kinds for name in k.model_fields})
    close = difflib.get_close_matches(last[0], names, n=1, cutoff=0.5)
    return f"{path}: no such key" + (f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(names)}")


def _walk(kind: Any, location: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """The models a pydantic location may lead to, and the location as the user writes it: without the tags of unions."""
    kinds, written = [kind], list[str]()
    for part in location:
        tagged = _tagged(kinds, part)
        if not tagged:
            written.append(str(part))
        kinds = tagged or [inner for k in kinds for inner in _step(k, part)]
    return kinds, written


def _tagged(kinds: Sequence[Any], tag: Any) -> list[Any]:
    """Of several alternatives the one whose `kind` is the tag; a tag may also be a field name of another alternative."""
    return [k for k in kinds if len(kinds) > 1 and "kind" in k.model_fields and tag in get_args(k.model_fields["kind"].annotation)]


def _step(kind: Any, part: Any) -> list[Any]:
    if isinstance(part, str) and part in kind.model_fields:
        return _models_in(kind.model_fields[part].annotation)
    return [kind]  # a list index: stay with the alternatives


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, list, Annotated):
        return [m for a in get_args(annotation) for m in _models_in(a)]
    return []
