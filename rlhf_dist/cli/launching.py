"""From a config to a run: the launcher of its `placement`."""

from __future__ import annotations

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
    from rlhf_dist.cli.ray_launch import run_under_ray

    return run_under_ray(program), True
