"""Ways to damage a file: its bytes, or the values in it. All are drawn from a `random.Random`, so a seed gives the same file again."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

TOKENS: tuple[bytes, ...] = (
    b"\0", b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r\n", b"\n", b"\r", b"\n\n",
    b'"', b"'", b",", b":", b"{", b"}", b"[", b"]",
    b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"-1", b"null", b"true",
    b'"\\ud83d"', b"\\u0000", b"\\", b'""', b"[" * 3000, b'{"a":' * 1500,
    b"&a [*a]", b"*a", b"<<: ", b"!!python/object/apply:os.system [true]", b"!!binary aGk=", b"? ",
    b"---\n", b"%YAML 9.9\n", b"\t", b"2020-13-45", b"0x1F",
    b"1_000", b"1:61:61", b"!!int x", b"!!timestamp x", b"\x1f\x8b", b"PAR1", b"ARROW1",
    b"\x00\x00\x00\x80", b"\xff\xff\xff\x7f", b"\xff" * 8,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324, "",
    " ", "a", "\0", "…", "\u2028", "x" * 5000, "..", "/",
    "../../x", "a\nb", "nan", "1", "1e5", "true", [], {}, [None], [[]], {"a": 1}, ["a", 1],
    {"role": "user"}, [{"role": "user", "content": "q"}],
    [{"role": "assistant", "content": None}], [{"role": 1, "content": "q"}], "\n\nHuman: q\n\nAssistant: a", [1, 2], [2, 1], ["a", "a"],
)  # fmt: skip


def damaged_bytes(content: bytes, draw: random.Random) -> bytes:
    """One to four changes of the bytes; now and then none."""
    for _ in range(draw.choice((0, 1, 1, 1, 1, 2, 4))):
        content = draw.choice(_BYTES)(content, draw)
    return content


def damaged_values(values: Any, draw: random.Random) -> Any:
    """A copy with one to three changes of what stands somewhere in it: another value, a key gone, renamed or added, an entry twice."""
    values = copy.deepcopy(values)
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = _places(values)
        if not places:
            return values
        inner, key = draw.choice(places)
        change = draw.randrange(6)
        if change <= 2:
            inner[key] = copy.deepcopy(draw.choice(VALUES))
        elif change == 3:
            del inner[key]
        elif isinstance(inner, dict):
            inner[draw.choice((f"{key}s", str(key)[:-1], "weight", "prompt", "chosen", "resume", "step"))] = inner[key]
            if change == 4:
                del inner[key]
        else:
            inner.insert(draw.randrange(len(inner) + 1), copy.deepcopy(inner[key]))
    return values


def _places(values: Any) -> list[tuple[Any, Any]]:
    keys = list(values) if isinstance(values, dict) else list(range(len(values))) if isinstance(values, list) else []
    return [(values, key) for key in keys] + [place for key in keys for place in _places(values[key])]


def _span(content: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randrange(len(content) + 1)
    return start, min(len(content), start + draw.choice((1, 2, 8, 64, 512)))


def _flip(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 4, 16))):
        if changed:
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _overwrite(content: bytes, draw: random.Random) -> bytes:
    start, stop = _span(content, draw)
    return content[:start] + bytes(draw.choice((0, 255, draw.randrange(256))) for _ in range(stop - start)) + content[stop:]


def _insert(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) + 1)
    return content[:at] + draw.choice(TOKENS) + content[at:]


def _replace(content: bytes, draw: random.Random) -> bytes:
    start, stop = _span(content, draw)
    return content[:start] + draw.choice(TOKENS) + content[stop:]


def _delete(content: bytes, draw: random.Random) -> bytes:
    start, stop = _span(content, draw)
    return content[:start] + content[stop:]


def _double(content: bytes, draw: random.Random) -> bytes:
    start, stop = _span(content, draw)
    return content[:stop] + content[start:stop] + content[stop:]


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.choice((0, len(content) - 1, draw.randrange(len(content) + 1)))]


def _swap(content: bytes, draw: random.Random) -> bytes:
    one, two = sorted((_span(content, draw), _span(content, draw)))
    return (
        content
        if one[1] > two[0]
        else content[: one[0]] + content[slice(*two)] + content[one[1] : two[0]] + content[slice(*one)] + content[two[1] :]
    )


def _ends(content: bytes, draw: random.Random) -> bytes:
    return draw.choice(
        (b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n"), content.replace(b"\n", b"\r"), content.rstrip(b"\n"), content + b"\0")
    )


_BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip,
    _flip,
    _overwrite,
    _insert,
    _insert,
    _replace,
    _delete,
    _double,
    _cut,
    _swap,
    _ends,
)
