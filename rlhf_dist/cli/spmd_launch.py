"""A stage inside the processes of the deepspeed launcher (or torchrun), or in one plain process: no Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch
from pydantic import ValidationError

from rlhf_dist.cli.interrupts import CTRL_C, Interrupted, listening
from rlhf_dist.cli.programs import Program, program_of
from rlhf_dist.cli.resuming import OVER, resumable
from rlhf_dist.config.errors import UserError
from rlhf_dist.engines.process import Rank, free_port, launched_world_size, start_process_group, stop_process_group
from rlhf_dist.runs.checkpoints import Checkpoint
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.lock import holding
from rlhf_dist.runs.progress import ConsoleReporter, NullReporter, Reporter
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.workers.spmd_group import SpmdGroup, agree, any_rank


def run_under_launcher(program: Program) -> tuple[Path, bool]:
    """Runs on this rank; returns the run folder, and whether this is rank 0.

    Raises:
        UserError: anything the user can mend. What only one rank can see is raised there, and the launcher ends the others.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    threads = torch.get_num_threads()
    # As in a Ray actor. Another number of threads sums in another order, so without this the launchers would differ by rounding.
    torch.set_num_threads(program.config.placement.threads_per_rank)
    rank, held = _join(), ExitStack()  # rank 0 holds the folder
    try:
        program = spanning_all_ranks(program, rank.world_size)
        root, over = agree(rank, lambda: _prepare(program, held))
        first = rank.rank == 0
        if over:
            return root, first
        recorder = Recorder(RunFolder(root), writes=first)
        reporter = ConsoleReporter() if first else NullReporter()
        with listening(root) as signals, closing(recorder), closing(reporter):
            checkpoint = agree(rank, lambda: _resumed(program, recorder, reporter))
            with spmd_groups(program, rank) as groups:
                result = program.run(groups, recorder, reporter, checkpoint, lambda: any_rank(rank, signals.asked()))
        if "stopped" in result:
            raise Interrupted(root, result["stopped"], signals.status or CTRL_C)
        return root, first
    finally:
        held.close()
        stop_process_group()
        torch.set_num_threads(threads)


@contextmanager
def spmd_groups(program: Program, rank: Rank) -> Iterator[dict[str, SpmdGroup]]:
    """The run's groups inside this process; they let their models go at the end."""
    groups: dict[str, SpmdGroup] = {}
    try:
        for demand in program.demands():
            groups[demand.role] = SpmdGroup(demand.role, program.factory(demand.role)(rank), rank)
        yield groups
    finally:
        for group in groups.values():
            group.close()


def spanning_all_ranks(program: Program, world_size: int) -> Program:
    """Every engine spans all ranks here, so the config that is saved says so.

    Raises:
        UserError: a config that does not fit so many ranks.
    """
    values = program.config.model_dump()
    for section in program.sections:
        values[section]["ranks"] = world_size
    kind = type(program.config)
    try:
        kind.model_validate(values | {"placement": values["placement"] | {"launcher": "ray"}})  # there the ranks count
        return program_of(kind.model_validate(values))
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"the config does not fit {world_size} ranks: {reason}", where="launcher", fix="start fewer ranks") from None


def _join() -> Rank:
    world_size = launched_world_size()
    if world_size is None or world_size == 1:
        return start_process_group(0, 1, 0, "127.0.0.1", free_port())
    place = os.environ
    local, address, port = place.get("LOCAL_RANK", "0"), place.get("MASTER_ADDR", "127.0.0.1"), place.get("MASTER_PORT", "29500")
    return start_process_group(int(place["RANK"]), world_size, int(local), address, int(port))


def _prepare(program: Program, held: ExitStack) -> tuple[Path, bool]:
    """The run folder, and whether the run is over already."""
    program.check()
    run = program.config.run
    folder, resume = RunFolder.named(run.output_dir, run.name), run.resume == "auto"
    if resume and folder.is_over:
        ConsoleReporter().message(OVER)
        return folder.root, True
    held.enter_context(holding(folder.root))
    return RunFolder.create(run.output_dir, run.name, run.overwrite, resume).root, False


def _resumed(program: Program, recorder: Recorder, reporter: Reporter) -> Checkpoint | None:
    recorder.clear_partial()
    return resumable(program.config, recorder, reporter) if program.config.run.resume == "auto" else None
