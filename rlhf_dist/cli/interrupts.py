"""Ctrl-C and SIGTERM during a run: the first asks it to end with its state saved, a second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rlhf_dist.runs.folder import MARKER

CTRL_C, TERMINATED = 130, 143


class Interrupted(Exception):
    """A run was told to end before it was over. The command line says so and ends with `status`.

    Args:
        root: the run's folder.
        step: steps done and saved; None where nothing was saved.
        status: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, root: Path, step: int | None = None, status: int = CTRL_C) -> None:
        super().__init__(root, step, status)
        self.root, self.step, self.status = root, step, status

    def __str__(self) -> str:
        if self.step is not None:
            return f"stopped after step {self.step}, its state is saved in {self.root}; go on with run.resume=auto"
        kept = any(each.is_file() and each.name != MARKER for each in self.root.glob("*"))
        return f"interrupted; what was recorded until then is in {self.root}" if kept else "interrupted before anything was recorded"


class Signals:
    """What has been asked for. status: None, or that of the first signal."""

    def __init__(self) -> None:
        self.status: int | None = None

    def asked(self) -> bool:
        """Whether the run is to end."""
        return self.status is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if self.status is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.status is None:
            self.status = CTRL_C if number == signal.SIGINT else TERMINATED


@contextmanager
def listening(root: Path) -> Iterator[Signals]:
    """Hears signals while a run is at work in this process.

    Raises:
        Interrupted: on a second Ctrl-C.
    """
    signals = Signals()
    here = threading.current_thread() is threading.main_thread()  # elsewhere Python hears none
    before = {number: signal.signal(number, signals) for number in (signal.SIGINT, signal.SIGTERM)} if here else {}
    try:
        yield signals
    except KeyboardInterrupt:
        raise Interrupted(root) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
