"""An interrupted run is told with its folder, and only where something is in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_dist.cli.interrupts import Interrupted, naming
from rlhf_dist.runs.folder import RunFolder


def test_the_folder_is_named_where_something_was_recorded(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    with pytest.raises(Interrupted) as caught, naming(folder.root):
        raise KeyboardInterrupt
    assert str(caught.value) == "interrupted before anything was recorded"
    folder.write_config("a: 1\n")
    assert str(caught.value) == f"interrupted; what was recorded until then is in {folder.root}"
    assert str(Interrupted(tmp_path / "gone")) == "interrupted before anything was recorded"


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), naming(tmp_path):
        raise ZeroDivisionError
