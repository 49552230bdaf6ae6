"""Shuffling while streaming: a buffer of bounded size, a function of seed and epoch alone."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rlhf_dist.data.records import stable_hash

T = TypeVar("T")


def shuffled(items: Iterable[T], *, buffer: int, seed: int, epoch: int) -> Iterator[T]:
    """Every item once, in an order that depends on buffer size, seed and epoch.

    Holds at most `buffer` items: each new item takes the place of a random one, which is yielded. An item can appear at most
    `buffer` places early, and arbitrarily late; a buffer as large as the data gives a uniform permutation.

    Args:
        buffer: items held; 0 and 1 keep the order.
    """
    if buffer <= 1:
        yield from items
        return
    # Only random() is promised to stay the same over Python versions; choice() and shuffle() are not.
    rng = random.Random(stable_hash(f"shuffle\0{seed}\0{epoch}"))
    held: list[T] = []
    for item in items:
        if len(held) < buffer:
            held.append(item)
            continue
        index = int(rng.random() * buffer)
        held[index], item = item, held[index]
        yield item
    while held:
        index = int(rng.random() * len(held))
        held[index], held[-1] = held[-1], held[index]
        yield held.pop()
