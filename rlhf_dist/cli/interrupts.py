"""Ctrl-C during a run: one line that says where the run's folder is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_dist.runs.folder import MARKER


class Interrupted(Exception):
    """Ctrl-C while a run was at work; `root` is its folder. The command line says so and ends with status 130."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.root = root

    def __str__(self) -> str:
        kept = any(each.is_file() and each.name != MARKER for each in self.root.glob("*"))
        return f"interrupted; what was recorded until then is in {self.root}" if kept else "interrupted before anything was recorded"


@contextmanager
def naming(root: Path) -> Iterator[None]:
    """Lets an interruption within the block know the run folder.

    Raises:
        Interrupted: on Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(root) from None
