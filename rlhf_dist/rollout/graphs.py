"""Decode steps of a few fixed shapes, so that a GPU can replay each as a CUDA graph instead of being told its kernels one by one.

A step is computed for the next larger number of rows and span out of a short list (a bucket); the rows that fill it up are idle, and what
comes out for them is thrown away. All that a step reads lies in memory that stays where it is: the decoder's state, its cache, the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Tensor]
"""Computes the logits [rows, V] of a bucket from what lies in the static buffers; reads nothing that Python could change between calls."""
Capture = Callable[[Step], Step]
"""Records a step; what it returns does the same work again, and its logits may lie where those of the last replay lay."""


@dataclass(frozen=True)
class Bucket:
    """The shape of a step."""

    rows: int
    span: int


@dataclass(frozen=True)
class Grid:
    """The buckets of a decoder: a least size, doubled until the most is reached.

    Args:
        least: its smallest rows and span.
        most: its largest, multiples of the smallest or not.
    """

    least: Bucket
    most: Bucket

    def bucket(self, rows: int, span: int) -> Bucket:
        """The smallest bucket that holds so many rows and positions."""
        return Bucket(_doubled(self.least.rows, rows, self.most.rows), _doubled(self.least.span, span, self.most.span))


class StepGraphs:
    """Runs steps by bucket: the first as it is, which also allocates whatever a capture must find in place, later ones as recorded.

    A graph reads weights and cache at fixed addresses, so it lives no longer than they do: as long as one call of the engine.

    Args:
        capture: what records a step.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._warm: set[Bucket] = set()
        self._replays: dict[Bucket, Step] = {}

    def run(self, bucket: Bucket, step: Step) -> Tensor:
        """The logits of this step; the next one may overwrite them."""
        replay = self._replays.get(bucket)
        if replay is None and bucket not in self._warm:
            self._warm.add(bucket)
            return step()
        if replay is None:
            replay = self._replays[bucket] = self._capture(step)
        return replay()


class CudaCapture:
    """Records a step as a CUDA graph. All graphs of one capture share their memory, since one is replayed at a time.

    Args:
        device: the GPU of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """Runs nothing yet.

        Raises:
            RuntimeError: the step does what no graph can hold, such as waiting for a number on the host.
        """
        graph: Any = torch.cuda.CUDAGraph()
        # Other threads of this process, such as NCCL's watchdog, may go on calling CUDA meanwhile.
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = step()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


def graphs_for(device: torch.device) -> StepGraphs | None:
    """Graphs on a GPU, None elsewhere."""
    return StepGraphs(CudaCapture(device)) if device.type == "cuda" else None


def _doubled(least: int, wanted: int, most: int) -> int:
    while least < wanted:
        least *= 2
    return min(least, most)
