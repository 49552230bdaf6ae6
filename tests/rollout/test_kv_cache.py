"""The slot cache on its own: what is stored where, and what a decode step sees."""

from __future__ import annotations

import torch

from rlhf_dist.rollout.kv_cache import DecodePlan, PrefillPlan, SlotCache

HEADS, WIDTH = 2, 3


def states(rows: int, positions: int, offset: float = 0.0) -> torch.Tensor:
    """Distinct numbers, [rows, HEADS, positions, WIDTH]."""
    return torch.arange(rows * HEADS * positions * WIDTH, dtype=torch.float32).view(rows, HEADS, positions, WIDTH) + offset


def decode_plan(lengths: list[int], span: int) -> DecodePlan:
    return DecodePlan(len(lengths), span, torch.arange(len(lengths)), torch.tensor(lengths))


def test_prefill_returns_what_it_was_given_and_stores_it_in_the_slots() -> None:
    cache = SlotCache(slots=4, max_len=8)
    keys, values = states(2, 5), states(2, 5, 1000.0)
    cache.plan = PrefillPlan(first=1, sources=torch.tensor([1, 0, 1]))
    assert cache.get_seq_length() == 0 and cache.get_mask_sizes(5, 0) == (5, 0)
    returned = cache.update(keys, values, 0)
    assert returned[0] is keys and returned[1] is values
    cache.plan = decode_plan([0, 5, 5, 5], 6)
    seen_keys, seen_values = cache.update(states(4, 1, 7000.0), states(4, 1, 8000.0), 0)
    for slot, source in ((1, 1), (2, 0), (3, 1)):
        assert torch.equal(seen_keys[slot, :, :5], keys[source]) and torch.equal(seen_values[slot, :, :5], values[source])


def test_decode_writes_every_row_at_its_own_length_and_returns_views() -> None:
    cache = SlotCache(slots=3, max_len=8)
    cache.plan = decode_plan([2, 0], 4)
    assert cache.get_seq_length() == 3 and cache.get_mask_sizes(1, 0) == (4, 0)
    new = states(2, 1, 1.0)
    keys, values = cache.update(new, -new, 0)
    assert keys.shape == values.shape == (2, HEADS, 4, WIDTH)
    assert torch.equal(keys[0, :, 2], new[0, :, 0]) and torch.equal(keys[1, :, 0], new[1, :, 0])
    assert keys.abs().sum() == new.abs().sum() and torch.equal(values, -keys)
    cache.plan = decode_plan([3, 1], 4)
    again, _ = cache.update(new, -new, 0)
    assert again.data_ptr() == keys.data_ptr()


def test_layers_take_their_shape_and_dtype_from_the_model() -> None:
    cache = SlotCache(slots=2, max_len=4)
    cache.plan = PrefillPlan(0, torch.tensor([0]))
    cache.update(torch.ones(1, 2, 3, 5), torch.ones(1, 2, 3, 7), 0)
    cache.update(torch.ones(1, 1, 3, 4).bfloat16(), torch.ones(1, 1, 3, 4).bfloat16(), 1)
    cache.plan = decode_plan([3], 4)
    keys, values = cache.update(torch.ones(1, 2, 1, 5), torch.ones(1, 2, 1, 7), 0)
    assert keys.shape == (1, 2, 4, 5) and values.shape == (1, 2, 4, 7)
    assert cache.update(torch.ones(1, 1, 1, 4).bfloat16(), torch.ones(1, 1, 1, 4).bfloat16(), 1)[0].dtype == torch.bfloat16


def test_move_copies_a_row_in_every_layer() -> None:
    cache = SlotCache(slots=3, max_len=4)
    cache.plan = PrefillPlan(0, torch.tensor([0, 1, 2]))
    for layer in (0, 1):
        cache.update(states(3, 4, 100.0 * layer), states(3, 4, 50.0), layer)
    cache.move(source=2, target=0, length=3)
    for layer in (0, 1):
        cache.plan = decode_plan([3, 3, 3], 4)
        keys, _ = cache.update(torch.zeros(3, HEADS, 1, WIDTH), torch.zeros(3, HEADS, 1, WIDTH), layer)
        assert torch.equal(keys[0, :, :3], states(3, 4, 100.0 * layer)[2, :, :3])
        assert torch.equal(keys[1, :, :3], states(3, 4, 100.0 * layer)[1, :, :3])
