"""YAML as plain values, and nothing that a reader of the file would not expect.

PyYAML's safe loader builds no objects, but it takes the last of two equal keys, lets a few lines of aliases unfold to any number of values,
and raises whatever Python raises at numbers, dates and depths that are too much for it.
"""

from __future__ import annotations

import unicodedata
from typing import Any

import yaml

MOST_VALUES = 100_000
"""What a file may unfold to, aliases counted each time they stand."""
DEEPEST = 100
_PLAIN = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "timestamp", "str", "seq", "map", "merge", "value")
)


def read_yaml(text: str) -> Any:
    """The values of one YAML document; None where it is empty.

    Raises:
        ValueError: no YAML, or with a key twice, a tag, a control character, half a surrogate pair, too many values or levels, or what
            looks like a number or a date and is none.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, {}, 0)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    except (KeyError, AttributeError, TypeError, OverflowError) as error:  # of PyYAML's own constructors
        raise ValueError(f"a value cannot be read ({error})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _check(node: Any, sizes: dict[int, int], depth: int) -> int:
    """How many values a node unfolds to. A node in itself unfolds without end, and so to too many levels."""
    if id(node) in sizes:
        return sizes[id(node)]
    if depth > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    if node.tag not in _PLAIN:
        raise ValueError(f"{node.tag!r} is no plain value{_line(node)}")
    size = 1
    if isinstance(node, yaml.ScalarNode):
        _check_text(node)
    else:
        inner = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
        _check_keys(node)
        size += sum(_check(each, sizes, depth + 1) for each in inner)
    if size > MOST_VALUES:
        raise ValueError(f"it unfolds to more than {MOST_VALUES} values")
    sizes[id(node)] = size
    return size


def _check_text(node: yaml.ScalarNode) -> None:
    if any(unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\t\r\n" for letter in node.value):
        raise ValueError(f"a control character or half a surrogate pair{_line(node)}")


def _check_keys(node: Any) -> None:
    seen = set()
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"a key that is no text{_line(key)}")
        if key.value in seen:
            raise ValueError(f"the key {key.value!r} comes twice{_line(key)}")
        seen.add(key.value)


def _line(node: Any) -> str:
    return f" (line {node.start_mark.line + 1})"
