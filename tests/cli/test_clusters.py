"""The cluster that a run starts for itself: nobody joins it without the token."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.distributed
def test_strangers_stay_outside() -> None:
    """In a process of its own: Ray takes notice of the token when it is imported."""
    program = """
        import os, subprocess, sys
        from rlhf_dist.cli.launching import with_a_token
        with_a_token()
        import ray
        from rlhf_dist.cli.clusters import cluster, cluster_nodes
        from rlhf_dist.workers.placement import Demand

        join = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print('inside')"
        with cluster([Demand("policy", 2, 1.0, 0.0, "PACK")]):
            assert cluster_nodes()[0].cpus >= 2
            address = ray.get_runtime_context().gcs_address
            plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
            for stranger in (plain | {"RAY_AUTH_MODE": "disabled"}, plain | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
                tried = subprocess.run([sys.executable, "-c", join, address], env=stranger, capture_output=True, text=True)
                assert tried.returncode and "inside" not in tried.stdout, tried.stdout
        print("alone")
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip().endswith("alone"), done.stdout + done.stderr


def test_a_cluster_that_is_not_there_or_asks_for_a_token_is_a_message() -> None:
    program = """
        import ray
        from rlhf_dist.cli.clusters import cluster
        from rlhf_dist.config.errors import UserError
        try:
            with cluster([]):
                pass
        except UserError as error:
            print(error)
    """
    for address in ("127.0.0.1:1", "nonsense"):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}
        environment["RAY_ADDRESS"] = address
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, timeout=240
        )
        assert f"cannot join the Ray cluster at {address}" in done.stdout and "RAY_AUTH_MODE" in done.stdout, done.stdout + done.stderr
