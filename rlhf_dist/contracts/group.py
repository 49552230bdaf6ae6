"""A worker group: several ranks of one role, whether Ray actors or the processes of the deepspeed launcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

P = TypeVar("P")
I = TypeVar("I")  # noqa: E741


@dataclass(frozen=True)
class Stored(Generic[P, I]):
    """A method's answer in two parts: a payload that stays with the workers, and a small record that may travel to the coordinator."""

    payload: P
    info: I


class Handle(Protocol):
    """One rank's answer, perhaps still being computed. Passed to `submit`, it stands for its payload."""

    def info(self) -> Any:
        """Waits for the small record (or the plain return value).

        Raises:
            UserError: what the worker raised, or the deadline passed.
        """
        ...


class WorkerGroup(Protocol):
    """Ranks of one role. `submit` never waits; handles among the arguments are delivered as payloads to the worker."""

    name: str
    world_size: int

    def submit(self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...] | None]) -> list[Handle]:
        """Calls a method of a role Protocol on every rank that is given arguments; returns their handles, in the order of the ranks.

        Args:
            method: for example `PolicyRole.generate`; its name is looked up on the worker.
            arguments: one tuple a rank, `world_size` of them. Handles may stand in them, also inside lists and tuples.
                None: this rank has no part in the call, which then must not be collective.
        """
        ...

    def collect(self, handles: Sequence[Handle]) -> list[Any]:
        """The records behind the handles, in order; the same on every rank that runs a coordinator."""
        ...

    def close(self) -> None:
        """Ends the workers and frees what they held. Safe to call twice."""
        ...
