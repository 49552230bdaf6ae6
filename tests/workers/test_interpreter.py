"""An interpreter that Ray could not use is refused before anything starts."""

import os
import stat
import sys
from pathlib import Path

import pytest

import rlhf_dist
from rlhf_dist.config.errors import UserError
from rlhf_dist.workers import interpreter
from rlhf_dist.workers.interpreter import check_interpreter, python_path


def answering(folder: Path, answer: str) -> str:
    """A program that says this, whatever it is asked."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_this_interpreter_is_fit() -> None:
    check_interpreter(sys.executable)


@pytest.mark.parametrize(
    ("answer", "message", "fix"),
    [
        ('{"python": "3.9.1", "ray": "2.0.0", "rlhf_dist": true}', "it has python 3.9.1, Ray needs", "python=="),
        ('{"python": "%s", "ray": null, "rlhf_dist": true}', r"it has ray \(none\), Ray needs", "ray=="),
        ('{"python": "%s", "ray": "%s", "rlhf_dist": false}', "rlhf_dist cannot be imported there", "--no-deps"),
        ("no answer", "it does not run", "/bin/python"),
    ],
)
def test_what_ray_could_not_use_is_refused_with_the_way_out(answer: str, message: str, fix: str, tmp_path: Path) -> None:
    import platform
    from importlib import metadata

    mine = (platform.python_version(), metadata.version("ray"))
    python = answering(tmp_path, answer % mine[: answer.count("%s")])
    with pytest.raises(UserError, match=message) as caught:
        check_interpreter(python)
    assert fix in caught.value.fix and caught.value.where == f"rollout.python, {python}"


def test_no_interpreter_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not run"):
        check_interpreter(str(tmp_path / "absent"))


def test_a_checkout_is_put_in_front_and_an_installed_package_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The folder of an installed one holds packages that the other environment has in other versions."""
    here = str(Path(rlhf_dist.__file__).resolve().parents[1])
    assert python_path("") == here and python_path(f"/a{os.pathsep}/b").split(os.pathsep) == [here, "/a", "/b"]
    monkeypatch.setattr(interpreter.rlhf_dist, "__file__", str(tmp_path / "site-packages" / "rlhf_dist" / "__init__.py"))
    assert python_path("/a") == "/a"
