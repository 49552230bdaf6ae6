"""A layer in 4 bits: NF4 as the paper has it, with gradients through it."""

import pytest
import torch
from torch import nn

from rlhf_dist.models.linear4bit import Linear4bit

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""arXiv 2305.14314, appendix E."""


def linear() -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(128, 64, bias=False)
    nn.init.normal_(made.weight, std=0.2)
    return made


def test_values_are_nf4_of_blocks_of_64() -> None:
    """Each weight is the nearest of 16 values times its block's largest; that scale is itself in 8 bits (double quantisation)."""
    plain = linear()
    got, weight = Linear4bit(plain, torch.float32, "cpu").values(), plain.weight.detach()
    assert got.dtype == torch.float32 and got.shape == weight.shape
    blocks, truth = got.reshape(-1, 64), weight.reshape(-1, 64)
    codes = torch.tensor(NF4)
    scale, largest = blocks.abs().amax(1, keepdim=True), truth.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scale, largest, rtol=0.05, atol=0.01)
    distance = (blocks / scale).unsqueeze(-1) - codes
    assert float(distance.abs().amin(-1).max()) < 1e-6
    nearest = ((truth / largest).unsqueeze(-1) - codes).abs().argmin(-1)
    assert float((distance.abs().argmin(-1) == nearest).float().mean()) > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_its_dequantised_weight_and_passes_gradients(dtype: torch.dtype) -> None:
    layer = Linear4bit(linear().to(dtype), dtype, "cpu")
    given = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_(True)
    plain = given.detach().clone().requires_grad_(True)
    got, want = layer(given), plain @ layer.values().to(dtype).T
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 0.05)
    got.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(given.grad, plain.grad, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 0.05)


def test_its_state_holds_the_weights_alone() -> None:
    layer = Linear4bit(linear(), torch.float32, "cpu")
    assert list(layer.state_dict()) == ["weight"] and layer.in_4_bits and not layer.weight.requires_grad
