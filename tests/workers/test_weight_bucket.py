"""A bucket as bytes and back, whatever the dtypes and shapes in it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.workers.weight_bucket import ALIGNMENT, fill, room_for, slots_of, views

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=6))
def test_weights_come_back_bit_for_bit(kinds) -> None:
    generator = torch.Generator().manual_seed(0)
    bucket = {
        f"w{number}": torch.randint(0, 100, shape, generator=generator).to(dtype) if dtype in (torch.int64, torch.uint8)
        else torch.randn(shape, generator=generator).to(dtype)
        for number, (dtype, shape) in enumerate(kinds)
    }  # fmt: skip
    slots = slots_of(bucket)
    flat = torch.zeros(room_for(slots), dtype=torch.uint8)
    fill(slots, bucket, flat)
    back = views(slots, flat)
    assert list(back) == list(bucket)
    assert all(back[name].dtype == weight.dtype and torch.equal(back[name], weight) for name, weight in bucket.items())
    assert all(slot.start % ALIGNMENT == 0 for slot in slots)


def test_weights_that_are_not_contiguous_are_laid_out_as_they_read() -> None:
    weight = torch.arange(6.0).view(2, 3).T
    slots = slots_of({"w": weight})
    flat = torch.zeros(room_for(slots), dtype=torch.uint8)
    fill(slots, {"w": weight}, flat)
    assert torch.equal(views(slots, flat)["w"], weight)


def test_views_are_no_copies() -> None:
    slots = slots_of({"w": torch.ones(2)})
    flat = torch.zeros(room_for(slots), dtype=torch.uint8)
    views(slots, flat)["w"].fill_(1.0)
    assert flat.any()


def test_bytes_that_are_too_few_are_noticed() -> None:
    with pytest.raises(RuntimeError):
        views(slots_of({"w": torch.ones(2)}), torch.zeros(7, dtype=torch.uint8))
