"""What a command is going to write, looked at before it loads a model: nothing is written over unasked, and the place takes files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from rlhf_dist.config.errors import UserError

Overwrite = Annotated[bool, typer.Option("--overwrite", help="write over what is there")]


def check_output_file(path: Path, *, overwrite: bool) -> None:
    """A file of rows that may be written.

    Raises:
        UserError: an ending of no format, something is there already, or the place cannot be written to.
    """
    from rlhf_dist.data.writing import writable_ending

    writable_ending(path)
    with mendable(path):
        if path.is_dir():
            raise UserError("the output is a file, and there is a folder of this name", where=str(path), fix="name another file")
        if path.exists() and not overwrite:
            raise UserError("the file to write exists", where=str(path), fix="name another file, or give --overwrite to replace it")
        _probe(path.parent)


def check_output_folder(path: Path, *, overwrite: bool) -> None:
    """A folder that may be written into.

    Raises:
        UserError: it is a file, or holds something, or cannot be written to.
    """
    with mendable(path):
        if path.exists() and not path.is_dir():
            raise UserError("the output is a folder, and there is a file of this name", where=str(path), fix="name another folder")
        if path.exists() and any(path.iterdir()) and not overwrite:
            fix = "name another folder, or give --overwrite to replace the files of the same names in it"
            raise UserError("the folder to write is not empty", where=str(path), fix=fix)
        _probe(path)


@contextmanager
def mendable(path: Path) -> Iterator[None]:
    """What the system refuses within the block (no rights, a full disk, a name that is too long) as an error that the user can mend.

    Raises:
        UserError: for any OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror or error}", where=str(path), fix="name a place that you may write to") from None


def _probe(folder: Path) -> None:
    """Writes and removes a file in the folder, or in the nearest one above it that exists: rights alone do not tell."""
    there = next(above for above in (folder.absolute(), *folder.absolute().parents) if above.exists())
    with tempfile.NamedTemporaryFile(dir=there, prefix=".rlhf-dist-probe-"):
        pass
