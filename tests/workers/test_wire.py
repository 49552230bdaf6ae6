"""Handles anywhere in the arguments become numbered places, and payloads come back in them."""

import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.roles import EstimateRequest
from rlhf_dist.workers.wire import pack, split, unpack


class Handle:
    """Stands for a payload elsewhere; must never be pickled itself."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def __reduce__(self) -> Any:
        raise AssertionError("a handle travelled as bytes")


@dataclass(frozen=True)
class Wrapped:
    inside: Any


def reference_of(value: Any) -> Any | None:
    return value.reference if isinstance(value, Handle) else None


def through(value: Any, payloads: dict[str, Any]) -> Any:
    data, references = pack(value, reference_of)
    assert isinstance(data, bytes)
    return unpack(data, [payloads[reference] for reference in references])


plain = st.one_of(st.none(), st.integers(), st.text(max_size=5), st.floats(allow_nan=False), st.booleans())
trees = st.recursive(
    st.one_of(plain, st.sampled_from("abc").map(lambda name: ("handle", name))),
    lambda inner: st.one_of(st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(st.text(max_size=3), inner), inner.map(Wrapped)),
)


def build(tree: Any, leaf: Any) -> Any:
    if isinstance(tree, tuple) and len(tree) == 2 and tree[0] == "handle":
        return leaf(tree[1])
    if isinstance(tree, Wrapped):
        return Wrapped(build(tree.inside, leaf))
    if isinstance(tree, list | tuple):
        return type(tree)(build(item, leaf) for item in tree)
    return {key: build(value, leaf) for key, value in tree.items()} if isinstance(tree, dict) else tree


@given(trees)
def test_payloads_stand_where_their_handles_stood(tree: Any) -> None:
    payloads = {name: [f"payload {name}"] for name in "abc"}
    assert through(build(tree, Handle), payloads) == build(tree, payloads.__getitem__)


def test_references_come_in_the_order_of_their_places() -> None:
    _, references = pack((Handle("a"), [1, (Handle("b"), {"x": Handle("a")})]), reference_of)
    assert references[:2] == ["a", "b"] and set(references) == {"a", "b"}


def test_one_handle_twice_is_one_payload_twice() -> None:
    handle, payload = Handle("a"), [1]
    first, second = through((handle, [handle]), {"a": payload})
    assert first is payload and second == [payload]


def test_requests_travel_whole() -> None:
    request = EstimateRequest((1.0, 2.0), {"r": (None, 3.0)}, (True, False), 0.1, 0.0)
    assert through((request, Handle("a"), []), {"a": "shard"}) == (request, "shard", [])


def test_a_payload_stays_and_a_record_travels_as_bytes() -> None:
    payload, record = split(Stored(torch.ones(3), {"rows": 3}))
    assert torch.equal(payload, torch.ones(3)) and pickle.loads(record) == {"rows": 3}


@pytest.mark.parametrize("answer", [None, 7, {"loss": 1.5}, (1, 2)])
def test_a_plain_answer_is_all_record(answer: Any) -> None:
    payload, record = split(answer)
    assert payload is None and pickle.loads(record) == answer
