"""From a config to a run: the launcher of its `placement`."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import Any

from rlhf_dist.models.quiet import quiet_libraries


def launch(config: Any) -> tuple[Path, bool]:
    """Runs the stage that the config belongs to; returns the run folder, and whether this process is the one that speaks to the user.

    Raises:
        UserError: anything the user can mend.
    """
    quiet_libraries()  # before the libraries are imported: some speak while they load
    from rlhf_dist.cli.programs import program_of

    program = program_of(config)
    if config.placement.launcher == "spmd":
        from rlhf_dist.cli.spmd_launch import run_under_launcher

        return run_under_launcher(program)
    with_a_token()
    from rlhf_dist.cli.ray_launch import run_under_ray

    return run_under_ray(program), True


def with_a_token() -> None:
    """Ray's servers listen on all addresses of the machine, and run what they are sent: those that are started here ask for a token, which
    this process makes up and its children inherit. Ray takes notice only before it is imported.

    Where the run joins a cluster (RAY_ADDRESS), or the user has chosen how Ray authenticates (RAY_AUTH_MODE), that holds.
    """
    if "ray" not in sys.modules and not os.environ.get("RAY_ADDRESS") and "RAY_AUTH_MODE" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
