"""Runs scripts as ranks, each in a process forked off this one, so that what they all import is imported once.
They share its seed of string hashes; ranks under Ray have one each.

Reads lines of JSON: script, arguments, and for each rank its environment and the files for what it says. Answers each with a line: what
every rank ended with.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from typing import Any

import torch
import transformers  # noqa: F401

import rlhf_dist.cli.main
import rlhf_dist.workers.roles  # noqa: F401
from rlhf_dist.engines.process import quiet_deepspeed


def become(script: str, arguments: list[str], rank: dict[str, Any]) -> None:
    """Runs the script in a process that is no other than one that Python was started for."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # and not the next job
    for number, path in ((1, rank["out"]), (2, rank["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.environ.clear()
    os.environ.update(rank["environment"])
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(script)
    status = 1
    try:
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        sys.stderr.write("" if isinstance(ended.code, int | None) else str(ended.code))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    quiet_deepspeed()
    assert torch.get_num_threads() == 1, "threads would not live through a fork"
    for line in sys.stdin:
        job = json.loads(line)
        children = []
        for rank in job["ranks"]:
            child = os.fork()
            if not child:
                become(job["script"], job["arguments"], rank)
            children.append(child)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
