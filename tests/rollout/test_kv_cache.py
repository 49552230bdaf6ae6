"""The slot cache on its own: what is stored where, and what a decode step sees."""

from __future__ import annotations

import pytest
import torch

from rlhf_dist.rollout.kv_cache import DecodePlan, PrefillPlan, SlotCache

HEADS, WIDTH = 2, 3


def states(rows: int, positions: int, offset: float = 0.0) -> torch.Tensor:
    """Distinct numbers, [rows, HEADS, positions, WIDTH]."""
    return torch.arange(rows * HEADS * positions * WIDTH, dtype=torch.float32).view(rows, HEADS, positions, WIDTH) + offset


def decode_plan(lengths: list[int], span: int) -> DecodePlan:
    return DecodePlan(len(lengths), span, torch.arange(len(lengths)), torch.tensor(lengths))


FOR_CPU = pytest.mark.parametrize("for_cpu", [False, True])


@FOR_CPU
def test_prefill_stores_pieces_in_their_slots_and_returns_all_positions_so_far(for_cpu: bool) -> None:
    cache = SlotCache(slots=4, max_len=8, for_cpu=for_cpu)
    keys, values = states(2, 5), states(2, 5, 1000.0)
    cache.plan = PrefillPlan(torch.tensor([3, 1]), start=0)
    assert cache.get_seq_length() == 0 and cache.get_mask_sizes(3, 0) == (3, 0)
    returned = cache.update(keys[:, :, :3], values[:, :, :3], 0)
    assert torch.equal(returned[0], keys[:, :, :3]) and torch.equal(returned[1], values[:, :, :3])
    cache.plan = PrefillPlan(torch.tensor([3, 1]), start=3)
    assert cache.get_seq_length() == 3 and cache.get_mask_sizes(2, 0) == (5, 0)
    returned = cache.update(keys[:, :, 3:], values[:, :, 3:], 0)
    assert torch.equal(returned[0], keys) and torch.equal(returned[1], values)
    cache.plan = decode_plan([0, 5, 0, 5], 6)
    seen_keys, seen_values = cache.update(states(4, 1, 7000.0), states(4, 1, 8000.0), 0)
    for slot, source in ((3, 0), (1, 1)):
        assert torch.equal(seen_keys[slot, :, :5], keys[source]) and torch.equal(seen_values[slot, :, :5], values[source])


@FOR_CPU
def test_decode_writes_every_row_at_its_own_length_and_returns_views(for_cpu: bool) -> None:
    cache = SlotCache(slots=3, max_len=8, for_cpu=for_cpu)
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


@FOR_CPU
def test_idle_rows_are_seen_but_store_nothing(for_cpu: bool) -> None:
    cache = SlotCache(slots=4, max_len=8, for_cpu=for_cpu)
    cache.plan = DecodePlan(4, 8, torch.arange(3), torch.tensor([2, 0, 1]))
    keys, values = cache.update(states(4, 1, 1.0), states(4, 1, 1.0), 0)
    assert keys.shape == (4, HEADS, 8, WIDTH) and torch.equal(keys[2, :, 1], states(4, 1, 1.0)[2, :, 0])
    assert keys[3].count_nonzero() == values[3].count_nonzero() == 0


def test_layers_take_their_shape_and_dtype_from_the_model() -> None:
    cache = SlotCache(slots=2, max_len=4)
    cache.plan = PrefillPlan(torch.tensor([0]), 0)
    cache.update(torch.ones(1, 2, 3, 5), torch.ones(1, 2, 3, 7), 0)
    cache.update(torch.ones(1, 1, 3, 4).bfloat16(), torch.ones(1, 1, 3, 4).bfloat16(), 1)
    cache.plan = decode_plan([3], 4)
    keys, values = cache.update(torch.ones(1, 2, 1, 5), torch.ones(1, 2, 1, 7), 0)
    assert keys.shape == (1, 2, 4, 5) and values.shape == (1, 2, 4, 7)
    assert cache.update(torch.ones(1, 1, 1, 4).bfloat16(), torch.ones(1, 1, 1, 4).bfloat16(), 1)[0].dtype == torch.bfloat16


def test_for_the_cpu_kernel_storage_is_fp32_with_keys_in_columns_and_bf16_comes_back_unchanged() -> None:
    cache = SlotCache(slots=2, max_len=16, for_cpu=True)
    keys, values = torch.randn(1, 2, 16, 4).bfloat16(), torch.randn(1, 2, 16, 4).bfloat16()
    for start in (0, 8):
        cache.plan = PrefillPlan(torch.tensor([1]), start)
        seen = cache.update(keys[:, :, start : start + 8], values[:, :, start : start + 8], 0)
    assert seen[0].dtype == torch.bfloat16 and torch.equal(seen[0], keys) and torch.equal(seen[1], values)
    cache.plan = decode_plan([0, 15], 16)
    decoded, _ = cache.update(torch.ones(2, 2, 1, 4).bfloat16(), torch.ones(2, 2, 1, 4).bfloat16(), 0)
    assert decoded.dtype == torch.float32 and decoded.transpose(2, 3).is_contiguous()


@FOR_CPU
@pytest.mark.parametrize(("source", "target"), [(2, 0), (torch.tensor([2, 2]), torch.tensor([0, 1]))])
def test_copy_takes_the_first_positions_in_every_layer(for_cpu: bool, source: int | torch.Tensor, target: int | torch.Tensor) -> None:
    cache = SlotCache(slots=3, max_len=4, for_cpu=for_cpu)
    cache.plan = PrefillPlan(torch.tensor([0, 1, 2]), 0)
    for layer in (0, 1):
        cache.update(states(3, 4, 100.0 * layer), states(3, 4, 50.0), layer)
    cache.copy(source, target, length=3)
    for layer in (0, 1):
        cache.plan = decode_plan([3, 3, 3], 4)
        keys, _ = cache.update(torch.zeros(3, HEADS, 1, WIDTH), torch.zeros(3, HEADS, 1, WIDTH), layer)
        before = states(3, 4, 100.0 * layer)
        assert torch.equal(keys[0, :, :3], before[2, :, :3])
        assert torch.equal(keys[1, :, :3], before[1 if isinstance(target, int) else 2, :, :3])
