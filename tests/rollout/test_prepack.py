"""Prepacked linear layers: same numbers, current weights, no trace left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlhf_dist.rollout import prepack
from rlhf_dist.rollout.prepack import prepack_available, prepacked

needs_ops = pytest.mark.skipif(not prepack_available(), reason="this torch has no oneDNN linear operators")


class Doubling(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(inputs)


@pytest.fixture
def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 17, bias=False), Doubling(17, 5))


@needs_ops
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 7), (70,)])
def test_same_numbers(layers: nn.Sequential, shape: tuple[int, ...]) -> None:
    inputs = torch.randn(*shape, 24)
    with torch.no_grad():
        expected = layers(inputs)
        with prepacked(layers):
            assert [("forward" in layer.__dict__) for layer in layers] == [True, False, True, False]
            assert torch.allclose(layers(inputs), expected, atol=1e-6)


@needs_ops
def test_bfloat16(layers: nn.Sequential) -> None:
    layers = layers.bfloat16()
    inputs = torch.randn(9, 24).bfloat16()
    with torch.no_grad(), prepacked(layers):
        packed = layers(inputs)
    assert torch.allclose(packed.float(), layers(inputs).float(), atol=0.03)


@needs_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_to_the_last_bit_among_4_and_among_64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(288, 768).to(dtype), torch.randn(64, 288).to(dtype)
    with torch.no_grad(), prepacked(layer):
        for rows in (4, 8, 12):
            assert torch.equal(layer(inputs)[:rows], layer(inputs[:rows]))


def test_weights_are_read_on_entry_and_all_is_as_before_on_exit(layers: nn.Sequential) -> None:
    inputs = torch.randn(4, 24)
    with torch.no_grad():
        with prepacked(layers):
            before = layers(inputs)
        layers[0].weight.mul_(2)
        with prepacked(layers):
            after = layers(inputs)
        assert not torch.allclose(before, after)
        assert torch.allclose(after, layers(inputs), atol=1e-6)
    assert not any("forward" in layer.__dict__ for layer in layers)


def test_restored_after_an_error(layers: nn.Sequential) -> None:
    with pytest.raises(RuntimeError, match="stop"), prepacked(layers):
        raise RuntimeError("stop")
    assert not any("forward" in layer.__dict__ for layer in layers)


def test_without_the_operators_the_plain_path_is_taken(layers: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepack, "prepack_available", lambda: False)
    with torch.no_grad(), prepacked(layers):
        assert not any("forward" in layer.__dict__ for layer in layers)
        assert layers(torch.randn(2, 24)).shape == (2, 5)


def test_a_forward_that_somebody_else_set_is_left_alone(layers: nn.Sequential) -> None:
    def theirs(inputs: torch.Tensor) -> torch.Tensor:
        return inputs.new_ones(len(inputs), 40)

    layers[0].forward = theirs  # type: ignore[method-assign]
    with prepacked(layers):
        assert layers[0].forward is theirs
    assert layers[0].forward is theirs
