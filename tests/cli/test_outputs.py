"""What may be written, told before anything is computed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from rlhf_dist.cli.outputs import check_output_file, check_output_folder, mendable
from rlhf_dist.config.errors import UserError


def test_new_places_are_fine_and_stay_as_they_were(tmp_path: Path) -> None:
    check_output_file(tmp_path / "new" / "a.jsonl", overwrite=False)
    check_output_folder(tmp_path / "new" / "report", overwrite=False)
    (tmp_path / "empty").mkdir()
    check_output_folder(tmp_path / "empty", overwrite=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"], "the look leaves nothing behind"


def test_nothing_is_written_over_unasked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("mine")
    with pytest.raises(UserError, match="the file to write exists") as caught:
        check_output_file(tmp_path / "a.jsonl", overwrite=False)
    assert "--overwrite" in caught.value.fix
    with pytest.raises(UserError, match="not empty") as caught:
        check_output_folder(tmp_path, overwrite=False)
    assert "--overwrite" in caught.value.fix
    check_output_file(tmp_path / "a.jsonl", overwrite=True)
    check_output_folder(tmp_path, overwrite=True)
    assert (tmp_path / "a.jsonl").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_stands_in_the_way_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "a.jsonl").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="a folder of this name"):
        check_output_file(tmp_path / "a.jsonl", overwrite=overwrite)
    with pytest.raises(UserError, match="a file of this name"):
        check_output_folder(tmp_path / "file", overwrite=overwrite)
    with pytest.raises(UserError, match="cannot tell which format"):
        check_output_file(tmp_path / "a.txt", overwrite=overwrite)


def test_a_place_that_takes_no_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    places = [tmp_path / "file" / "below", tmp_path / ("x" * 300), Path("/proc/nowhere")]
    for place in places:
        with pytest.raises(UserError, match="cannot write: ") as caught:
            check_output_folder(place, overwrite=True)
        assert caught.value.where == str(place)
    with pytest.raises(UserError, match="cannot write: "):
        check_output_file(tmp_path / "file" / "a.jsonl", overwrite=True)


def test_what_the_system_refuses_later_is_an_error_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write: No space left") as caught, mendable(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.where == str(tmp_path)
