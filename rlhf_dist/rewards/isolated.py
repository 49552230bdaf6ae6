"""A reward that is a Python function of the user's, in a process of its own: what it does to that process, it does not do to the run."""

from __future__ import annotations

from typing import Any

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.reward import Attempt, RewardFailure, RewardRequest
from rlhf_dist.rewards.process import FunctionProcess, ProcessEnded, TookTooLong


class FunctionReward:
    """`def reward(prompts, completions, **columns) -> list[float | None]`, one process a rank (`rewards.guard.Fallible`).

    The process lives as long as this object and its own process. When a call takes too long, or the process dies, another is
    started for the next call: what the function kept in memory begins anew then.

    Args:
        name: name in metrics and messages.
        path: `package.module:function` or `file.py:function`.
        start_timeout_s: longest that loading it may take.

    Raises:
        UserError: the function cannot be loaded, or cannot be called by keyword.
    """

    by_row = False

    def __init__(self, name: str, path: str, start_timeout_s: float = 300.0) -> None:
        self.name = name
        self._path, self._start_timeout_s = path, start_timeout_s
        self._process = FunctionProcess(name, path)
        self._start()

    def attempt(self, request: RewardRequest, limit_s: float) -> Attempt:
        """Calls the function once, for `limit_s` seconds at most; loading it anew comes on top.

        Raises:
            UserError: what no other try would mend: a column that the data lacks, a module that cannot be loaded any more.
        """
        if not self._process.alive:
            self._start()
        try:
            answer = self._process.ask(request, limit_s)
        except TookTooLong:
            return self._failed(request, "timeout", f"did not answer within {limit_s:g} s", "make it faster, or raise its timeout_s")
        except ProcessEnded as ended:
            return self._failed(request, "death", f"took its process down: it {ended}", "see what it does to its process, or its memory")
        _refused(answer)
        return _read(answer)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()

    def _start(self) -> None:
        try:
            _refused(self._process.start(self._start_timeout_s))
        except TookTooLong:
            fix = "load large things when they are first needed, or raise its start_timeout_s"
            raise UserError(f"reward {self.name!r} was not loaded within {self._start_timeout_s:g} s", where=self._path, fix=fix) from None
        except ProcessEnded as ended:
            raise UserError(f"reward {self.name!r} could not be loaded: its process {ended}", where=self._path, fix="mend it") from None

    def _failed(self, request: RewardRequest, kind: Any, what: str, fix: str) -> Attempt:
        rows = len(request)
        return Attempt.failed(rows, RewardFailure(kind, f"reward {self.name!r} {what}", self._path, fix, rows=rows, of_call=True))


def _refused(answer: dict[str, Any]) -> None:
    if "refused" in answer:
        raise UserError(answer["refused"]["what"], where=answer["refused"]["where"], fix=answer["refused"]["fix"])


def _read(answer: dict[str, Any]) -> Attempt:
    kinds = [RewardFailure(**fields) for fields in answer["failures"]]
    return Attempt(
        tuple(answer["values"]), dict(zip((row for row, _ in answer["rows"]), (kinds[i] for _, i in answer["rows"]), strict=True))
    )
