"""Dead and stuck processes: how often to try again, how to replace them, and what to write down of those that hang."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.group import Lost, RankReport, SupervisedGroup, WorkerGroup

COLLECTIVES = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/", "torch/distributed/rendezvous.py")
"""Files whose functions wait for other ranks."""


@dataclass
class Budget:
    """How many recoveries are left. Whenever the run gets further than it ever was, all of them are.

    restarts: in a row. furthest: steps done at best.
    """

    restarts: int
    furthest: int = 0
    spent: int = 0

    def charge(self, step: int, lost: Lost) -> None:
        """Counts a recovery.

        Raises:
            UserError: none is left.
        """
        if step > self.furthest:
            self.furthest, self.spent = step, 0
        if self.spent >= self.restarts:
            fix = f"mend the cause ({lost.fix}) and go on with run.resume=auto, or raise placement.restarts"
            raise UserError(f"{lost.what}; {self.spent} recoveries did not get the run past step {step}", where=lost.where, fix=fix)
        self.spent += 1


def rebuild(groups: Sequence[WorkerGroup]) -> None:
    """Starts groups anew, side by side.

    Raises:
        Lost: a rank died while it loaded. UserError: there is no place for them, or their models cannot be loaded.
    """
    anew = [cast(SupervisedGroup, group) for group in groups]
    for group in anew:
        group.begin_rebuild()
    for group in anew:
        group.finish_start()


def stuck_report(lost: Lost, groups: Sequence[WorkerGroup], phase: str) -> tuple[str, list[WorkerGroup]]:
    """What every process is at, in text, and the groups that seem to hold the others up.

    Of a group that waits in a collective, a rank is missing there if it is elsewhere, or gives no sign of life.
    """
    lines = [f"{lost.what}", f"asked: {lost.where}", phase, ""]
    to_blame: list[WorkerGroup] = []
    for group in groups:
        reports = cast(SupervisedGroup, group).census()
        missing = missing_ranks(reports)
        busy = [report for report in reports if report.method or not report.answered]
        if busy:
            to_blame.append(group)
        lines.append(f"{group.name}: " + _in_words(reports, missing))
        for report in reports:
            state = f"in {report.method} for {report.seconds:.0f} s" if report.method else "between calls"
            state = state if report.answered else "NO SIGN OF LIFE"
            lines += [f"  rank {report.rank} ({report.where}), {report.calls} calls begun: {state}"]
            lines += [f"    {line}" for line in report.stack.splitlines()]
        lines.append("")
    return "\n".join(lines), to_blame


def missing_ranks(reports: Sequence[RankReport]) -> list[int]:
    """The ranks that others of their group wait for: those that are not in a collective while some rank is."""
    waiting = {report.rank for report in reports if report.answered and _in_collective(report)}
    return [report.rank for report in reports if report.rank not in waiting] if waiting else []


def _in_collective(report: RankReport) -> bool:
    return bool(report.method) and any(name in report.stack for name in COLLECTIVES)


def _in_words(reports: Sequence[RankReport], missing: Sequence[int]) -> str:
    silent = [report.rank for report in reports if not report.answered]
    if missing:
        return f"waits in a collective for rank {', '.join(map(str, missing))}"
    if silent:
        return f"no sign of life from rank {', '.join(map(str, silent))}"
    return "working" if any(report.method for report in reports) else "idle"
