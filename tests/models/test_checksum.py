"""The checksum hears every single bit and no order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_dist.models import checksum as module
from rlhf_dist.models.checksum import MODULUS, checksum


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (3, 4), "b.weight": (3, 4), "b.bias": (4,), "scale": (), "none": (0,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_single_change_is_heard(dtype) -> None:
    """A change of the last bit of one number, wherever it stands."""
    before = checksum(weights(dtype).items())
    integers = {2: torch.int16, 4: torch.int32}
    seen = {before}
    for name in ("a.weight", "b.weight", "b.bias", "scale"):
        for place in range(weights(dtype)[name].numel()):
            changed = weights(dtype)
            bits = changed[name].reshape(-1).view(integers[changed[name].element_size()])
            bits[place] ^= 1
            changed[name] = bits.view(dtype).reshape(changed[name].shape)
            seen.add(checksum(changed.items()))
    assert len(seen) == 1 + 12 + 12 + 4 + 1


@given(value=st.floats(-1e3, 1e3, width=32), place=st.integers(0, 11))
def test_any_other_value_is_heard(value: float, place: int) -> None:
    changed = weights()
    changed["a.weight"].view(-1)[place] = value
    same = torch.equal(changed["a.weight"].view(torch.int32), weights()["a.weight"].view(torch.int32))
    assert (checksum(changed.items()) == checksum(weights().items())) == same


def test_weights_that_change_places_are_heard() -> None:
    swapped, turned = weights(), weights()
    swapped["a.weight"], swapped["b.weight"] = swapped["b.weight"], swapped["a.weight"]
    turned["b.bias"] = turned["b.bias"].flip(0)
    renamed = {f"x.{name}": weight for name, weight in weights().items()}
    assert len({checksum(w.items()) for w in (weights(), swapped, turned, renamed)}) == 4


@given(st.permutations(sorted(weights())), st.integers(0, 5))
def test_neither_order_nor_buckets_are_heard(order: list[str], cut: int) -> None:
    ordered = [(name, weights()[name]) for name in order]
    assert checksum(ordered) == checksum(weights().items()) == (checksum(ordered[:cut]) + checksum(ordered[cut:])) % MODULUS


def test_chunks_are_not_heard_and_layout_is_not(monkeypatch) -> None:
    large = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(1))}
    whole = checksum(large.items())
    monkeypatch.setattr(module, "PERIOD", 7)
    several = []
    for chunk in (7, 70, 7000):
        monkeypatch.setattr(module, "CHUNK", chunk)
        several.append(checksum(large.items()))
    assert len(set(several)) == 1 and several[0] != whole  # the period is part of the definition, the chunk is not
    turned = weights()["a.weight"].T.contiguous().T
    assert not turned.is_contiguous() and checksum([("a", turned)]) == checksum([("a", weights()["a.weight"])])


def test_a_negative_zero_is_another_weight() -> None:
    assert checksum([("w", torch.tensor([0.0]))]) != checksum([("w", torch.tensor([-0.0]))])
