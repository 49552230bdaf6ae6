"""A worker group: several ranks of one role, whether Ray actors or the processes of the deepspeed launcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from rlhf_dist.config.errors import UserError

P = TypeVar("P")
I = TypeVar("I")  # noqa: E741


@dataclass(frozen=True)
class Stored(Generic[P, I]):
    """A method's answer in two parts: a payload that stays with the workers, and a small record that may travel to the coordinator."""

    payload: P
    info: I


class Lost(UserError):
    """Processes of a group are dead or stuck, or what they kept is gone. Who waited may rebuild the group and ask again.

    late: nobody died, but there was no answer within the deadline.
    """

    late: bool = False


class Late(Lost):
    """No answer within the deadline."""

    late = True


@dataclass(frozen=True)
class RankReport:
    """What one rank of a group is at, as it says itself.

    answered: False where its process gave no sign of life. method: the call it is in, empty between calls; calls: those begun so far;
    seconds: in this call. stack: of every Python thread.
    """

    rank: int
    answered: bool
    where: str = ""
    method: str = ""
    calls: int = 0
    seconds: float = 0.0
    stack: str = ""


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


@runtime_checkable
class SupervisedGroup(WorkerGroup, Protocol):
    """A group whose processes can be replaced while the run goes on. `submit` and `collect` raise `Lost` where that may help."""

    def alive(self) -> bool:
        """Whether every rank gives a sign of life."""
        ...

    def intact(self, handles: Sequence[Handle]) -> bool:
        """Whether what stands behind the handles is there, or still on its way from a living process; never waits for it."""
        ...

    def begin_rebuild(self) -> None:
        """Ends all ranks (one alone cannot rejoin a collective), and has new ones load their models."""
        ...

    def finish_start(self) -> None:
        """Waits until every rank has loaded its models."""
        ...

    def census(self) -> list[RankReport]:
        """What every rank is at."""
        ...
