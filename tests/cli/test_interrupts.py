"""An interrupted run is asked to end with its state saved, and says where; a second Ctrl-C ends it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from rlhf_dist.cli.interrupts import CTRL_C, TERMINATED, Interrupted, listening
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
MARK = "RLHF_DIST_TEST"
PATIENCE_S = 150.0


def test_the_folder_is_named_where_something_was_recorded(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    with pytest.raises(Interrupted) as caught, listening(folder.root):
        raise KeyboardInterrupt
    assert str(caught.value) == "interrupted before anything was recorded" and caught.value.status == CTRL_C
    folder.write_config("a: 1\n")
    assert str(caught.value) == f"interrupted; what was recorded until then is in {folder.root}"
    assert str(Interrupted(tmp_path / "gone")) == "interrupted before anything was recorded"
    said = str(Interrupted(folder.root, 3, TERMINATED))
    assert said == f"stopped after step 3, its state is saved in {folder.root}; go on with run.resume=auto"


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), listening(tmp_path):
        raise ZeroDivisionError


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, CTRL_C), (signal.SIGTERM, TERMINATED)])
def test_the_first_signal_asks_and_the_handlers_come_back(tmp_path: Path, number: signal.Signals, status: int) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with listening(tmp_path) as signals:
        assert not signals.asked() and signals.status is None
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)  # preemption may be said twice: it does not cut the saving short
        assert signals.asked() and signals.status == status
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught, listening(tmp_path):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")
    assert caught.value.step is None


def test_in_another_thread_nothing_is_heard_and_nothing_breaks(tmp_path: Path) -> None:
    seen: list[bool] = []

    def elsewhere() -> None:
        with listening(tmp_path) as signals:
            seen.append(signals.asked())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [False]


class Command:
    """`rlhf-dist ppo` as a user starts it: of all its processes the environment bears a mark."""

    def __init__(self, values: dict[str, Any], folder: Path) -> None:
        self.root, self._mark = Path(values["run"]["output_dir"]) / values["run"]["name"], str(folder)
        (folder / "run.yaml").write_text(yaml.safe_dump(values))
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name not in ("RANK", "WORLD_SIZE")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_dist.cli.main", "ppo", "--config", str(folder / "run.yaml")],
            env=clean | {"PYTHONPATH": str(ROOT), MARK: self._mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def interrupt(self) -> None:
        """Ctrl-C in a terminal: every process of the group gets it, those that Ray started too."""
        os.killpg(self.process.pid, signal.SIGINT)

    def steps(self) -> list[int]:
        path = self.root / "metrics.jsonl"
        return [line["step"] for line in read_metrics(path)] if path.is_file() else []

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while step not in self.steps():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "no step in time"
            time.sleep(0.1)

    def ended(self) -> tuple[int, str]:
        """Its status and what it said on standard error."""
        _, said = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, said

    def left_behind(self) -> list[str]:
        """Processes that outlive it, a few seconds after its end."""
        deadline = time.monotonic() + 20
        while found := [each.name() for each in psutil.process_iter() if _environment(each).get(MARK) == self._mark]:
            if time.monotonic() > deadline:
                return found
            time.sleep(0.3)
        return []

    def kill(self) -> None:
        for each in psutil.process_iter():
            if _environment(each).get(MARK) == self._mark:
                each.kill()


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


@pytest.fixture
def begun(ppo_values: dict[str, Any], tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """`begun("ray")`: a run of very many steps, of few processes: the policy is its own reference, and there is no value model."""
    made: list[Command] = []

    def begin(launcher: str) -> Command:
        ppo_values["run"]["steps"] = 100_000
        ppo_values["placement"] = {"launcher": launcher}
        if launcher == "ray":
            ppo_values["algorithm"]["estimator"] = "reinforce"
            ppo_values["policy"]["lora"] = {"r": 4}
        ppo_values["evaluation"] = ppo_values["checkpoint"] = {"every": 0}
        made.append(Command(ppo_values, tmp_path))
        return made[-1]

    yield begin
    for each in made:
        each.kill()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("launcher", "number", "status"),
    [
        ("spmd", signal.SIGINT, 130),
        ("spmd", signal.SIGTERM, 143),
        ("ray", signal.SIGINT, 130),
        pytest.param("ray", signal.SIGTERM, 143, marks=pytest.mark.long),
    ],
)
def test_a_real_run_ends_with_its_state_saved_and_leaves_no_process(
    begun: Callable[..., Command], launcher: str, number: signal.Signals, status: int
) -> None:
    run = begun(launcher)
    run.wait_for_step(1)
    if number == signal.SIGINT:
        run.interrupt()
    else:
        run.process.send_signal(number)
    code, said = run.ended()
    assert code == status, said[-3000:]
    done = run.steps()[-1]
    assert f"stopped after step {done}, its state is saved in {run.root}; go on with run.resume=auto" in said and "Traceback" not in said
    assert [path.name for path in (run.root / "checkpoints").iterdir()] == [f"step_{done:06d}"]
    assert run.left_behind() == []


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["spmd", pytest.param("ray", marks=pytest.mark.long)])
def test_a_second_ctrl_c_ends_a_real_run_in_seconds(begun: Callable[..., Command], launcher: str) -> None:
    """Also where the run cannot hear the first: it stands still."""
    run = begun(launcher)
    run.wait_for_step(1)
    workers = [each for each in psutil.Process(run.process.pid).children(recursive=True) if each.name().startswith("ray::Host")]
    for each in workers:
        each.suspend()
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.02 if launcher == "spmd" else 2)
    began = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    code, said = run.ended()
    assert code == 130 and "Traceback" not in said, said[-3000:]
    assert time.monotonic() - began < 40
    assert run.left_behind() == []


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_driver_takes_its_cluster_along(begun: Callable[..., Command]) -> None:
    """Nothing is left that trains on, and writes into the folder that the next try goes on in."""
    run = begun("ray")
    run.wait_for_step(1)
    run.process.kill()
    assert run.ended()[0] == -signal.SIGKILL and run.left_behind() == []
