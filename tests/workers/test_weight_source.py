"""The policy's side: what is counted is what is exported, whichever way it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_dist.contracts.weights import Link
from rlhf_dist.models.checksum import checksum
from rlhf_dist.workers.weight_link import Receiver
from rlhf_dist.workers.weight_source import WeightSource

WEIGHTS = {f"w{number}": torch.full((10,), float(number)) for number in range(5)}
LINK = Link("ipc", "gloo", "127.0.0.1", 0, 1, 80, 20.0)


class Engine:
    """Exports known weights; remembers how it was asked."""

    device = torch.device("cpu")

    def __init__(self, rank: int = 0) -> None:
        self.rank, self.asked = rank, list[Any]()

    def export_weights(self, merged: bool = True, bucket_bytes: int = 0) -> Iterator[dict[str, Tensor]]:
        self.asked.append((merged, bucket_bytes))
        names = list(WEIGHTS)
        for start in range(0, 5, 2):
            yield {name: WEIGHTS[name].clone() for name in names[start : start + 2]}


@pytest.fixture
def source() -> WeightSource:
    return WeightSource(Engine())  # type: ignore[arg-type]


def test_a_rank_without_a_link_counts_what_it_exports(source: WeightSource) -> None:
    """Ranks that have drifted apart would count something else."""
    sent = source.send(LINK)
    assert (sent.checksum, sent.bytes, sent.buckets) == (checksum(WEIGHTS.items()), 200, 3)


def test_the_rank_that_opened_the_link_sends(source: WeightSource) -> None:
    opened = source.open(LINK)
    taken: dict[str, Tensor] = {}
    with ThreadPoolExecutor(1) as thread:
        receiving = thread.submit(lambda: Receiver(opened, 0, Engine.device).receive(lambda bucket: taken.update(bucket)))
        assert source.send(opened) == receiving.result(20)
    assert taken.keys() == WEIGHTS.keys() and source._engine.asked == [(True, 80)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("rank", [0, 1])
def test_buckets_are_kept_on_rank_0_one_a_call_export_after_export(rank: int) -> None:
    source = WeightSource(Engine(rank))  # type: ignore[arg-type]
    for _ in range(2):
        answers = [source.next(80) for _ in range(4)]
        assert [answer.info.bytes for answer in answers] == [80, 80, 40, 0]
        assert [answer.info.done for answer in answers[:3]] == [None] * 3 and answers[3].payload == {}
        done = answers[3].info.done
        assert done is not None and (done.checksum, done.bytes, done.buckets) == (checksum(WEIGHTS.items()), 200, 3)
        assert [name for answer in answers for name in answer.payload] == (list(WEIGHTS) if rank == 0 else [])
