"""A PPO run whose processes are killed at chosen calls: the program that `chaos.py` starts again and again.

    python benchmarks/sabotage.py FOLDER      (reads FOLDER/ppo.yaml and FOLDER/kills.json, goes on with what is there)

A kill is fired at one call of one step: before it is sent, or a moment later, while it is worked on. What was fired stands in
FOLDER/events.jsonl before anything dies, so none is fired twice.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from rlhf_dist.cli.programs import PPOProgram, never
from rlhf_dist.cli.ray_launch import run_under_ray
from rlhf_dist.config.loading import load_config
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.models.quiet import quiet_libraries

COORDINATOR, EVERYTHING = "coordinator", "everything"


@dataclass(frozen=True)
class Kill:
    """One death. step: index of the PPO step. call: `role.method`; nth: of those calls within the step. victim: `role rank`, the
    coordinator, or everything. delay_s: after the call was sent; negative: before."""

    number: int
    step: int
    call: str
    nth: int
    victim: str
    delay_s: float


class Log:
    """Appends to events.jsonl: what was killed, what the run said, which step was done, each with the time."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "events.jsonl"

    def write(self, **event: Any) -> None:
        """One line, on disk before this returns."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time()} | event) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All lines so far."""
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()] if self._path.is_file() else []


class Witness:
    """A reporter that also writes down what it is told, and knows the step."""

    def __init__(self, reporter: Any, log: Log) -> None:
        self._reporter, self._log, self.at = reporter, log, -1
        self.calls: Counter[str] = Counter()

    def phase(self, step: int, name: str) -> None:
        if name != "evaluate" and step != self.at:
            self.at = step
            self.calls.clear()
            self._log.write(kind="begins", step=step)
        self._reporter.phase(step, name)

    def message(self, text: str) -> None:
        self._log.write(kind="message", text=text)
        self._reporter.message(text)

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self._log.write(kind="done", step=step)
        self._reporter.step(step, total, metrics)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reporter, name)


class Saboteur:
    """Fires kills from within the coordinator's process."""

    def __init__(self, kills: Sequence[Kill], groups: Mapping[str, Any], witness: Witness, log: Log, driver: int) -> None:
        fired = {event["number"] for event in log.read() if event["kind"] == "kill"}
        self._kills = [kill for kill in kills if kill.number not in fired]
        self._groups, self._witness, self._log, self._driver = groups, witness, log, driver
        for group in groups.values():
            group.submit = self._sabotaged(group.name, group.submit)

    def _sabotaged(self, role: str, submit: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(method: Callable[..., Any], arguments: Any) -> Any:
            call = f"{role}.{method.__name__}"
            nth = self._witness.calls[call]
            self._witness.calls[call] += 1
            due = [kill for kill in self._kills if (kill.step, kill.call, kill.nth) == (self._witness.at, call, nth)]
            for kill in due:
                self._kills.remove(kill)
                if kill.delay_s < 0:
                    self._fire(kill)
            handles = submit(method, arguments)
            for kill in due:
                if kill.delay_s >= 0:
                    threading.Timer(kill.delay_s, self._fire, [kill]).start()
            return handles

        return wrapped

    def _fire(self, kill: Kill) -> None:
        role, _, rank = kill.victim.partition(" ")
        process = self._groups[role].processes()[int(rank)] if rank else os.getpid()
        self._log.write(kind="kill", **asdict(kill))
        if kill.victim == EVERYTHING:
            kill_tree(self._driver)
        os.kill(process, signal.SIGKILL)


def kill_tree(root: int) -> None:
    """The driver and all that it started, Ray's own processes included; this process last."""
    family = [process for process in psutil.Process(root).children(recursive=True) if process.pid != os.getpid()]
    for process in [*family, psutil.Process(root)]:
        process.kill()


class SabotagedPPO(PPOProgram):
    """PPO with a saboteur in its coordinator."""

    def __init__(self, config: PPOConfig, folder: Path) -> None:
        super().__init__(config)
        self._folder, self._driver = folder, os.getpid()

    def run(self, groups: Any, recorder: Any, reporter: Any, resume: Any = None, stopping: Callable[[], bool] = never) -> dict[str, Any]:
        """As PPO."""
        log = Log(self._folder)
        witness = Witness(reporter, log)
        kills = [Kill(**kill) for kill in json.loads((self._folder / "kills.json").read_text(encoding="utf-8"))]
        Saboteur(kills, groups, witness, log, self._driver)
        log.write(kind="starts", step=resume.step if resume else 0)
        return super().run(groups, recorder, witness, resume, stopping)


def main(folder: Path) -> None:
    """Runs until the run is over, or until this process is killed."""
    quiet_libraries()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    run_under_ray(SabotagedPPO(load_config(PPOConfig, folder / "ppo.yaml"), folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
