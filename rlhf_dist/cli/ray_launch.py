"""A stage under Ray: the coordinator in an actor beside this process, the engines in groups of actors."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_dist.cli.clusters import cluster, cluster_nodes
from rlhf_dist.cli.interrupts import CTRL_C, Interrupted, Signals, listening
from rlhf_dist.cli.programs import Program
from rlhf_dist.cli.resuming import OVER, resumable
from rlhf_dist.config.errors import UserError, first_line
from rlhf_dist.config.operation import PlacementSection
from rlhf_dist.contracts.group import Lost
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.lock import holding
from rlhf_dist.runs.progress import BufferedReporter, ConsoleReporter, Event, Furthest, Reporter, replay
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.runs.supervision import Budget
from rlhf_dist.workers.placement import check_placement
from rlhf_dist.workers.ray_group import RayGroup, release

POLL_S, EVENTS_S = 0.3, 5.0
ENDING_S = 60.0


def run_under_ray(program: Program) -> Path:
    """Runs on the cluster of RAY_ADDRESS, or on one that is started here and ended after the run; returns the run folder.

    A coordinator that dies takes its workers along; a new one goes on from the last checkpoint, as often as `placement.restarts` says.

    Raises:
        UserError: anything the user can mend.
        Interrupted: the run was told to end.
    """
    program.check()
    run, reporter = program.config.run, Furthest(ConsoleReporter())
    folder, resume = RunFolder.named(run.output_dir, run.name), run.resume == "auto"
    if resume and folder.is_over:
        reporter.message(OVER)
        return folder.root
    with cluster(program.demands()):
        check_placement(program.demands(), cluster_nodes())
        with holding(folder.root):
            root = RunFolder.create(run.output_dir, run.name, run.overwrite, resume).root
            with closing(reporter), listening(root) as signals:
                result = _until_over(program, root, resume, reporter, signals)
    if "stopped" in result:
        raise Interrupted(root, result["stopped"], signals.status or CTRL_C)
    return root


def _until_over(program: Program, root: Path, resume: bool, reporter: Furthest, signals: Signals) -> dict[str, Any]:
    """As many coordinators as it takes, one after the other."""
    budget = Budget(program.config.placement.restarts)
    while True:
        try:
            return _attempt(program, root, resume, reporter, signals)
        except CoordinatorLost as lost:
            if RunFolder(root).is_over:  # it died after it had done everything
                return {}
            budget.charge(reporter.furthest, lost)
            reporter.message(f"the coordinator died; it is started again: {lost.what}")
            resume = True


class CoordinatorLost(Lost):
    """The coordinator's process is gone, and its workers with it."""


def _attempt(program: Program, root: Path, resume: bool, reporter: Reporter, signals: Signals) -> dict[str, Any]:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(CoordinatorActor)
    label = uuid.uuid4().hex
    actor = remote.options(num_cpus=0, max_concurrency=3, scheduling_strategy=here).remote(program, str(root), os.getcwd(), label)
    try:
        return _follow(actor, actor.run.remote(resume), reporter, signals, program.config.placement)
    finally:
        ray.kill(actor)
        release(label, program.demands())


class CoordinatorActor:
    """The coordinator's process. `events` and `stop` answer while `run` runs (three threads)."""

    def __init__(self, program: Program, root: str, folder: str, label: str) -> None:
        os.chdir(folder)
        self._program, self._root, self._label = program, root, label
        self._reporter = BufferedReporter()
        self._asked_to_stop = threading.Event()

    def run(self, resume: bool) -> dict[str, Any]:
        """The whole run; returns the summary. The groups end with it, whatever happens."""
        # One that is about to die, with its driver, may still be writing.
        with holding(Path(self._root), "coordinator", ENDING_S), closing(Recorder(RunFolder.open(self._root))) as recorder:
            recorder.clear_partial()
            checkpoint = resumable(self._program.config, recorder, self._reporter) if resume else None
            with ray_groups(self._program, self._label) as groups:
                return self._program.run(groups, recorder, self._reporter, checkpoint, self._asked_to_stop.is_set)

    def stop(self) -> None:
        """Asks the run to end where its state can be saved."""
        self._asked_to_stop.set()

    def events(self, since: int) -> list[Event]:
        """Progress since an event number."""
        return self._reporter.drain(since)


@contextmanager
def ray_groups(program: Program, label: str = "") -> Iterator[dict[str, RayGroup]]:
    """The run's groups by role, placed and loaded side by side (or one after the other), and ended at the end."""
    groups: dict[str, RayGroup] = {}
    try:
        for demand in program.demands():
            groups[demand.role] = RayGroup(demand, program.factory(demand.role), program.config.placement, label)
        for together in [[group] for group in groups.values()] if program.loads_in_turn else [list(groups.values())]:
            for group in together:
                group.begin_start()
            for group in together:
                group.finish_start()
        yield groups
    finally:
        for group in groups.values():
            group.close()


def _follow(actor: Any, run: Any, reporter: Reporter, signals: Signals, placement: PlacementSection) -> dict[str, Any]:
    """Shows progress until the run is over.

    Raises:
        CoordinatorLost: its process died, or gave no sign of life for `placement.heartbeat_timeout_s` and was ended.
        UserError: what the run raised.
    """
    seen, told = 0, False
    done: list[Any] = []
    allowed_s, heard = placement.start_timeout_s, time.monotonic()
    while not done:
        done, _ = ray.wait([run], timeout=POLL_S)
        if signals.asked() and not told:
            reporter.message("stopping: the state is saved first (Ctrl-C again ends at once)")
            actor.stop.remote()
            told = True
        if not done:
            with suppress(RayError):  # the run itself says what is wrong
                seen += _replay(actor, seen, reporter)
                allowed_s, heard = placement.heartbeat_timeout_s, time.monotonic()
            if time.monotonic() - heard > allowed_s:
                raise CoordinatorLost(f"no sign of life for {allowed_s:g} s", where="coordinator", fix="go on with run.resume=auto")
    try:
        result: dict[str, Any] = ray.get(run)
    except RayActorError as error:
        fix = "look for the cause in the Ray logs and go on with run.resume=auto"
        raise CoordinatorLost(first_line(error), where="coordinator", fix=fix) from None
    except RayTaskError as error:
        _replay(actor, seen, reporter)
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    _replay(actor, seen, reporter)
    return result


def _replay(actor: Any, seen: int, reporter: Reporter) -> int:
    events = ray.get(actor.events.remote(seen), timeout=EVENTS_S)
    replay(events, reporter)
    return len(events)
