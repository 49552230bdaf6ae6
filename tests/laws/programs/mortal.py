"""Runs of one plain process (or of the ranks of a launcher) that are killed at chosen places and begun again with `run.resume=auto`.

usage: mortal.py JOBS      (a JSON file; see `Job`)

Every try is a process of its own, forked off this one, so what is imported is imported once. What a try said stands in `said.log` beside
the run folder. The last line printed is JSON for the harness: one entry a job, the deaths that happened.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_dist.cli.interrupts import Interrupted
from rlhf_dist.cli.programs import program_of
from rlhf_dist.cli.spmd_launch import run_under_launcher
from rlhf_dist.config.dpo import DPOConfig
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.config.reward_model import RewardModelConfig
from rlhf_dist.config.sft import SFTConfig

STAGES: dict[str, Any] = {"ppo": PPOConfig, "sft": SFTConfig, "dpo": DPOConfig, "reward": RewardModelConfig}
RECORDED = ("metrics", "begin_checkpoint", "commit_checkpoint", "summary")


@dataclass(frozen=True)
class Job:
    """One run. deaths: (steps done, place) in order; a place is `role.method` or `recorder.method`, the second such call of a step ends
    on ` 2` and so on, and ` after` means when it has returned. damage: files of the run folder of which a byte is turned over after the
    first death. stop: steps after which the run is asked to end; it is not begun again.
    """

    stage: str
    values: dict[str, Any]
    deaths: Sequence[tuple[int, str]] = ()
    damage: str = ""
    stop: int = -1
    fired: list[tuple[int, str]] = field(default_factory=list)


class Mortal:
    """A program that dies at one place."""

    def __init__(self, program: Any, place: tuple[int, str] | None, stop: int) -> None:
        self._program, self._place, self._stop = program, place, stop
        self.done, self._calls = 0, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def run(self, groups: Any, recorder: Any, reporter: Any, resume: Any, stopping: Any) -> dict[str, Any]:
        """As the program."""
        self.done = resume.step if resume else 0
        for group in groups.values():
            group.submit = self._submitting(group.name, group.submit)
        for name in RECORDED:
            setattr(recorder, name, self._calling(f"recorder.{name}", getattr(recorder, name)))
        reporter.step = self._counting(reporter.step)
        result: dict[str, Any] = self._program.run(groups, recorder, reporter, resume, lambda: stopping() or self.done == self._stop)
        return result

    def _counting(self, step: Callable[..., None]) -> Callable[..., None]:
        def counted(done: int, *rest: Any) -> None:
            self.done = done
            self._calls.clear()
            step(done, *rest)

        return counted

    def _submitting(self, role: str, submit: Callable[..., Any]) -> Callable[..., Any]:
        return lambda method, arguments: self._calling(f"{role}.{method.__name__}", submit)(method, arguments)

    def _calling(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **named: Any) -> Any:
            self._calls[name] += 1
            nth = f" {self._calls[name]}" if self._calls[name] > 1 else ""
            self._die_at(f"{name}{nth}")
            answer = call(*given, **named)
            self._die_at(f"{name}{nth} after")
            return answer

        return called

    def _die_at(self, place: str) -> None:
        if (self.done, place) == self._place:
            os.kill(os.getpid(), signal.SIGKILL)


def attempt(job: Job, place: tuple[int, str] | None, log: Path) -> int:
    """One try in a process of its own; returns its status, negative after a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    with log.open("a", buffering=1, encoding="utf-8") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            config = STAGES[job.stage].model_validate(job.values)
            program: Any = Mortal(program_of(config), place, job.stop)
            program.config = config
            run_under_launcher(spanning(program))
            status = 0
        except Interrupted:
            status = 0
        except UserError as error:
            print("error:", error)
            status = 2
        except BaseException:
            traceback.print_exc()
        said.flush()
        os._exit(status)


def spanning(program: Any) -> Any:
    """`run_under_launcher` makes a program anew for its ranks: this one is to stay."""
    from rlhf_dist.cli import spmd_launch

    plain = spmd_launch.spanning_all_ranks

    def spanned(given: Any, world_size: int) -> Any:
        inner = plain(given._program, world_size)
        given._program, given.config = inner, inner.config
        return given

    spmd_launch.spanning_all_ranks = spanned
    return program


def live(job: Job) -> list[list[Any]]:
    """The whole run, with its deaths; returns those that happened."""
    log = Path(job.values["run"]["output_dir"]) / f"{job.values['run']['name']}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    happened: list[list[Any]] = []
    for place in [*map(tuple, job.deaths), None]:
        status = attempt(job, place, log)  # type: ignore[arg-type]
        if place is None or status not in (0, -signal.SIGKILL):
            happened.append(["ended", status])
            break
        happened.append([*place, status])
        if job.damage and len(happened) == 1:
            damage(log.with_suffix(""), job.damage)
    return happened


def damage(root: Path, pattern: str) -> None:
    """Turns one byte over in each of the files."""
    for path in glob.glob(pattern, root_dir=root):
        data = bytearray((root / path).read_bytes())
        data[len(data) // 2] ^= 0xFF
        (root / path).write_bytes(data)


if __name__ == "__main__":
    jobs = [Job(**values) for values in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))]
    print(json.dumps([live(job) for job in jobs]))
