"""What this machine can do at most, measured: matrix products and copies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from limits import Ceilings
from measuring import now

SQUARES = {"cpu": (1024, 2048), "cuda": (4096, 8192, 16384)}
COPIES_MIB = {"cpu": (256, 512), "cuda": (1024, 4096)}
LEAST_SECONDS, LEAST_RUNS = 0.2, 3


def ceilings(dtype: torch.dtype, device: str, shapes: tuple[tuple[int, int, int], ...] = ()) -> tuple[Ceilings, dict[str, float]]:
    """F and W with the threads that torch is set to; and each measurement they are the largest of.

    Args:
        shapes: rows, inputs, outputs of linear layers to try besides square ones, such as those of the model that is measured.
    """
    sizes = {f"matrix {m}x{k}x{n}": (m, k, n) for m, k, n in (*((size,) * 3 for size in SQUARES[device]), *shapes)}
    products = {name: matrix_rate(size, dtype, device) for name, size in sizes.items()}
    copies = {f"copy {mib} MiB": copy_rate(mib, device) for mib in COPIES_MIB[device]}
    return Ceilings(max(products.values()), max(copies.values())), products | copies


def matrix_rate(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> float:
    """Floating-point operations a second of a linear layer: [m, k] times the transpose of [n, k]."""
    m, k, n = size
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(rows, k, generator=generator, device=device).to(dtype) for rows in (m, n))
    out = torch.empty(m, n, dtype=dtype, device=device)
    return 2.0 * m * k * n / best_seconds(lambda: torch.mm(left, right.T, out=out), device)


def copy_rate(mib: int, device: str) -> float:
    """Bytes a second, read and written ones together, of copying so many MiB."""
    source = torch.zeros(mib * 2**20, dtype=torch.uint8, device=device).fill_(1)
    target = torch.zeros_like(source)
    return 2.0 * source.numel() / best_seconds(lambda: target.copy_(source), device)


def best_seconds(run: Callable[[], object], device: str) -> float:
    """The shortest of several runs after one that is not timed: a ceiling is what can be done, not what usually is."""
    run()
    found: list[float] = []
    while len(found) < LEAST_RUNS or sum(found) < LEAST_SECONDS:
        began = now(device)
        run()
        found.append(now(device) - began)
    return min(found)
