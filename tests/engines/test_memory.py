"""Freed memory is used again instead of being asked from the kernel, page by page."""

import platform
import subprocess
import sys

import pytest

PROBE = """
import resource, sys, torch
from rlhf_dist.engines.memory import keep_freed_memory
done = keep_freed_memory() if sys.argv[1] == "keep" else None
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20).sum()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(done, faults[-1])
"""


def probe(mode: str, **variables: str) -> tuple[str, int]:
    command = [sys.executable, "-c", PROBE, mode]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"} | variables
    done, faults = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return done, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_a_block_that_was_freed_is_taken_again_without_asking_for_its_pages() -> None:
    """64 MiB are 16,384 pages (or 32 huge ones). It takes glibc a few rounds: an aligned block needs a slightly larger hole."""
    (_, before), (done, after) = probe("leave"), probe("keep")
    assert done == "True" and after < before / 4 and after < 10


def test_the_users_own_choice_is_left_alone() -> None:
    assert probe("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
