"""The one error a user is meant to read: what happened, where, and what to do next."""

from __future__ import annotations


class UserError(Exception):
    """A fault the user can mend. The command line prints it as one block and exits with status 2.

    Args:
        what: what happened, in one sentence.
        where: file and line, config key, reward name, rank or phase.
        fix: what to do next.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.fix)

    def __str__(self) -> str:
        parts = [self.what]
        if self.where:
            parts.append(f"  where: {self.where}")
        if self.fix:
            parts.append(f"  do:    {self.fix}")
        return "\n".join(parts)


def _rebuild(kind: type[UserError], what: str, where: str, fix: str) -> UserError:
    return kind(what, where=where, fix=fix)
