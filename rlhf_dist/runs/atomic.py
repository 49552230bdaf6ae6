"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_dist.config.errors import writing


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what was written there takes the place of `path` when the block ends well.

    The folder is made when absent. When the block raises, `path` stays as it was and the temporary file is removed.

    Raises:
        UserError: the disk is full, or may not be written to.
        FileNotFoundError: the block wrote nothing.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            to_disk(temporary)
            os.replace(temporary, path)
            to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_disk(path: Path) -> None:
    """Brings a file's contents, or the names in a folder, to disk. Without it a power cut may leave a new name with none of its contents,
    and a file or a rename may not be there at all."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
