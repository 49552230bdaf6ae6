"""Seconds by phase, as the coordinator waited for them, and response tokens, so that throughput is a plain quotient."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Wall time of the phases of one step, or of a whole run. Phases that overlap count to the one that was waited for.

    worked: what a phase took by its workers' own clocks, where it may run beside others; its throughput is by these.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    worked: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to a phase."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def add(self, other: Clock) -> None:
        """Takes in another clock."""
        for name, seconds in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        for name, seconds in other.worked.items():
            self.worked[name] = self.worked.get(name, 0.0) + seconds
        self.tokens += other.tokens

    def throughput(self) -> dict[str, float]:
        """Response tokens per second of each phase that took time."""
        return {name: self.tokens / seconds for name, seconds in (self.seconds | self.worked).items() if seconds > 0 and self.tokens}

    def metrics(self) -> dict[str, float]:
        """`perf/*`: seconds and tokens per second by phase, and of the whole step."""
        total = sum(self.seconds.values())
        named = {f"perf/{name}_seconds": seconds for name, seconds in self.seconds.items()}
        named |= {f"perf/{name}_worked_seconds": seconds for name, seconds in self.worked.items()}
        named |= {f"perf/{name}_tokens_per_second": rate for name, rate in self.throughput().items()}
        return named | {"perf/step_seconds": total, "perf/tokens_per_second": self.tokens / total if total else 0.0}
