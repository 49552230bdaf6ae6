"""The interpreter of another environment that rollout ranks run in: it must be able to talk to this one."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import rlhf_dist
from rlhf_dist.config.errors import UserError

INSTALLED = ("site-packages", "dist-packages")
PROBE = """
import importlib.metadata as m, importlib.util as u, json, platform
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return None
print(json.dumps({"python": platform.python_version(), "ray": version("ray"), "rlhf_dist": u.find_spec("rlhf_dist") is not None}))
"""
TIMEOUT_S = 60


def python_path(inherited: str) -> str:
    """PYTHONPATH with the folder that this package stands in, where that is a checkout: an installed one has all its neighbours there."""
    folder = Path(rlhf_dist.__file__).resolve().parents[1]
    added = [] if folder.name in INSTALLED else [str(folder)]
    return os.pathsep.join([*added, *filter(None, inherited.split(os.pathsep))])


def check_interpreter(python: str) -> None:
    """Whether Ray can start our workers in it. The same path must lead to such an environment on every node.

    Raises:
        UserError: no interpreter, or one of another version; another version of Ray; rlhf_dist cannot be imported there.
    """
    found = _probe(python)
    mine = {"python": platform.python_version(), "ray": metadata.version("ray")}
    for name, wanted in mine.items():
        if found[name] != wanted:
            what = f"it has {name} {found[name] or '(none)'}, Ray needs {wanted} as here"
            raise UserError(what, where=f"rollout.python, {python}", fix=f"make that environment with {name}=={wanted}")
    if not found["rlhf_dist"]:
        fix = "install it there without its pins: pip install --no-deps rlhf-dist"
        raise UserError("rlhf_dist cannot be imported there", where=f"rollout.python, {python}", fix=fix)


def _probe(python: str) -> dict[str, str | bool | None]:
    environment = os.environ | {"PYTHONPATH": python_path(os.environ.get("PYTHONPATH", ""))}
    try:
        done = subprocess.run([python, "-c", PROBE], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
        found: dict[str, str | bool | None] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        fix = "give the path of a Python, for example /opt/vllm/bin/python"
        raise UserError(f"it does not run: {error}", where=f"rollout.python, {python}", fix=fix) from error
    return found
