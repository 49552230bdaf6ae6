"""The decode kernel: equal to a plain softmax, to the last bit the same whatever other rows and masked positions stand beside."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlhf_dist.rollout.attention import slot_attention
from rlhf_dist.rollout.kv_cache import DecodePlan, SlotCache

ROWS, SPAN, WIDTH = 12, 128, 8


class Layer(nn.Module):
    """What transformers asks of a module: whether it is causal and how many heads share their keys."""

    is_causal = True

    def __init__(self, shared: int) -> None:
        super().__init__()
        self.num_key_value_groups = shared


def stored(groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [ROWS, groups, SPAN, WIDTH] as the cache lays them out."""
    cache = SlotCache(ROWS, SPAN, for_cpu=True)
    cache.plan = DecodePlan(ROWS, SPAN, torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.long))
    keys, values = cache.update(torch.zeros(ROWS, groups, 1, WIDTH), torch.zeros(ROWS, groups, 1, WIDTH), 0)
    return keys.copy_(torch.randn(keys.shape)), values.copy_(torch.randn(values.shape))


def mask(lengths_N: torch.Tensor) -> torch.Tensor:
    """Additive, [n, 1, 1, SPAN]: the first `lengths` positions are seen."""
    hidden = torch.arange(SPAN) >= lengths_N[:, None]
    return torch.zeros(len(lengths_N), 1, 1, SPAN).masked_fill(hidden[:, None, None], torch.finfo(torch.float32).min)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("scaling", [None, 0.9])
def test_equal_to_a_plain_softmax(dtype: torch.dtype, shared: int, scaling: float | None) -> None:
    keys, values = stored(2)
    query, lengths = torch.randn(ROWS, 2 * shared, 1, WIDTH).to(dtype), torch.arange(1, ROWS + 1) * 5
    out, _ = slot_attention(Layer(shared), query, keys, values, mask(lengths), scaling=scaling)
    assert out.shape == (ROWS, 1, 2 * shared, WIDTH) and out.dtype == dtype
    scale = WIDTH**-0.5 if scaling is None else scaling
    for row, length in enumerate(lengths.tolist()):
        for head in range(2 * shared):
            seen_keys, seen_values = keys[row, head // shared, :length], values[row, head // shared, :length]
            weights = (seen_keys @ query[row, head, 0].float() * scale).softmax(0)
            assert torch.allclose(out[row, 0, head].float(), weights @ seen_values, atol=1e-5 if dtype == torch.float32 else 1e-2)


def test_a_bias_by_position_is_added() -> None:
    keys, values = stored(2)
    query, bias = torch.randn(ROWS, 2, 1, WIDTH), torch.randn(1, 2, 1, SPAN)
    everything = mask(torch.full((ROWS,), SPAN))
    out, _ = slot_attention(Layer(1), query, keys, values, everything, scaling=0.3, position_bias=bias)
    weights = (query @ keys.transpose(2, 3) * 0.3 + bias).softmax(-1)
    assert torch.allclose(out, (weights @ values).transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_to_the_last_bit_beside_any_others_and_in_any_span(dtype: torch.dtype) -> None:
    keys, values = stored(2)
    query, lengths = torch.randn(ROWS, 4, 1, WIDTH).to(dtype), torch.full((ROWS,), 13)
    whole, _ = slot_attention(Layer(2), query, keys, values, mask(lengths))
    for rows in (4, 8):
        for span in (64, 80, 112):
            few = mask(lengths)[:rows, ..., :span]
            part, _ = slot_attention(Layer(2), query[:rows], keys[:rows, :, :span], values[:rows, :, :span], few)
            assert torch.equal(part, whole[:rows])


def test_several_positions_and_masks_of_booleans_go_to_pytorchs_kernel() -> None:
    keys, values = stored(2)
    query = torch.randn(ROWS, 2, 5, WIDTH)
    causal, _ = slot_attention(Layer(1), query, keys[:, :, :5], values[:, :, :5], None, scaling=0.5)
    expected = nn.functional.scaled_dot_product_attention(query, keys[:, :, :5], values[:, :, :5], is_causal=True, scale=0.5)
    assert torch.allclose(causal, expected.transpose(1, 2), atol=1e-6)
    seen = mask(torch.arange(1, ROWS + 1))
    one, _ = slot_attention(Layer(1), query[:, :, :1], keys, values, seen == 0)
    assert torch.allclose(one, slot_attention(Layer(1), query[:, :, :1], keys, values, seen)[0], atol=1e-6)
