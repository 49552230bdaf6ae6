"""Count, mean and squared deviation of a set of numbers, mergeable over shards and ranks (Chan et al. 1979), in double precision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Moments:
    """n numbers with this mean and this sum of squared deviations."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    @property
    def variance(self) -> float:
        """Unbiased variance.

        Raises:
            ValueError: fewer than two numbers.
        """
        if self.count < 2:
            raise ValueError(f"whitening needs at least two valid tokens; the batch has {self.count}")
        return self.m2 / (self.count - 1)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together."""
        if not other.count or not self.count:
            return other if not self.count else self
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count, self.mean + delta * other.count / count, self.m2 + other.m2 + delta * delta * self.count * other.count / count
        )


def merged_moments(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts together."""
    result = Moments()
    for part in parts:
        result = result.merge(part)
    return result
