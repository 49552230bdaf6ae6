"""A look at every process of a group, time and again: one that gives no sign of life is ended, so that whoever waits for it notices."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError


class Heartbeat(threading.Thread):
    """Watches the actors of a group until it is stopped. How long a process may take to be there at all is the deadline of its start.

    Args:
        name: of the group.
        actors: `workers.host.Host`s, by rank.
        every_s: between two looks.
        timeout_s: how long a process may stay silent. Stopped, swapped out or cut off from the network, it is worse than a dead one.
    """

    def __init__(self, name: str, actors: Sequence[Any], every_s: float, timeout_s: float) -> None:
        super().__init__(name=f"heartbeat of {name}", daemon=True)
        self.reason = ""
        self._group, self._actors = name, list(actors)
        self._every_s, self._timeout_s = every_s, timeout_s
        self._seen: set[int] = set()
        self._over = threading.Event()
        self.start()

    def stop(self) -> None:
        """Ends the watch."""
        self._over.set()

    def run(self) -> None:
        """Looks at all ranks at once. Those that died are for their callers to notice."""
        while not self._over.wait(self._every_s):
            asked = [actor.pulse.remote() for actor in self._actors]
            ray.wait(asked, num_returns=len(asked), timeout=self._timeout_s)
            for rank, reference in enumerate(asked):
                self._look(rank, reference)

    def _look(self, rank: int, reference: Any) -> None:
        try:
            ray.get(reference, timeout=0.1)
            self._seen.add(rank)
        except GetTimeoutError:
            if self._over.is_set() or rank not in self._seen:
                return
            self.reason = f"{self._group} rank {rank} gave no sign of life for {self._timeout_s:g} s and was ended"
            ray.kill(self._actors[rank])
        except RayError:
            return
