"""The one error a user is meant to read: what happened, where, and what to do next."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def writing(where: object) -> Iterator[None]:
    """Says in plain words why something could not be written: the disk is full, or may not be written to.

    Args:
        where: the file or folder.

    Raises:
        UserError: an OSError of the block, or one that a library passed on in words; a missing file stays what it is.
    """
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)
        if not full and not isinstance(error, OSError):
            raise
        what = "the disk is full" if full else f"it cannot be written ({getattr(error, 'strerror', None) or error})"
        fix = "free space, then go on with run.resume=auto" if full else "mend the file system or its permissions"
        raise UserError(what, where=str(where), fix=fix) from error


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line; its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _rebuild(kind: type[UserError], what: str, where: str, fix: str) -> UserError:
    return kind(what, where=where, fix=fix)
