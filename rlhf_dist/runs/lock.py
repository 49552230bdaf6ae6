"""One run in one folder at a time: two would write over each other, and both would think that all is well."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_dist.config.errors import UserError, writing

POLL_S = 0.2


@contextmanager
def holding(root: Path, who: str = "run", wait_s: float = 0.0) -> Iterator[None]:
    """Holds a run folder for as long as the block lasts, or until this process dies. The lock lies beside the folder, which may be emptied.

    Args:
        root: the run folder; it need not be there yet.
        who: the driver (`run`) and the coordinator each hold a lock of their own.
        wait_s: how long another process may still be busy ending.

    Raises:
        UserError: another process holds it (named), or the lock cannot be written.
    """
    path = root.with_name(f".{root.name}.{who}.lock")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _acquire(descriptor, root, time.monotonic() + wait_s)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{socket.gethostname()}, process {os.getpid()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, root: Path, until: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                other = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
                fix = "wait for it to end, or end it; or set run.name to another name"
                raise UserError(f"a run is at work in this folder ({other})", where=str(root), fix=fix) from None
            time.sleep(POLL_S)
