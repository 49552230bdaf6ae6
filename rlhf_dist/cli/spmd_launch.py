"""PPO inside the processes of the deepspeed launcher (or torchrun), or in one plain process: no Ray."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf_dist.cli.checks import check_run
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.coordinator.ppo import PPOCoordinator
from rlhf_dist.coordinator.recorder import Recorder
from rlhf_dist.coordinator.shards import Groups
from rlhf_dist.engines.process import Rank, free_port, launched_world_size, start_process_group, stop_process_group
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.progress import ConsoleReporter, NullReporter
from rlhf_dist.workers.roles import build_worker, needed_roles
from rlhf_dist.workers.spmd_group import SpmdGroup, agree


def run_under_launcher(config: PPOConfig) -> tuple[Path, bool]:
    """Runs on this rank; returns the run folder, and whether this is rank 0.

    Raises:
        UserError: anything the user can mend; every rank raises it.
    """
    rank = _join()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        config = spanning_all_ranks(config, rank.world_size)
        root = agree(rank, lambda: _prepare(config))
        reporter = ConsoleReporter() if rank.rank == 0 else NullReporter()
        recorder = Recorder(RunFolder.open(root) if rank.rank == 0 else None)
        groups = {role: SpmdGroup(role, build_worker(role, config, rank), rank) for role in needed_roles(config)}
        try:
            PPOCoordinator(config, Groups(**groups), recorder, reporter).run()
        finally:
            recorder.close()
            if isinstance(reporter, ConsoleReporter):
                reporter.close()
        return root, rank.rank == 0
    finally:
        stop_process_group()


def spanning_all_ranks(config: PPOConfig, world_size: int) -> PPOConfig:
    """Every engine spans all ranks here, so the config that is saved says so.

    Raises:
        UserError: a config that does not fit so many ranks.
    """
    values = config.model_dump()
    for role in ("policy", "reference", "value", "reward"):
        values[role]["ranks"] = world_size
    try:
        return PPOConfig.model_validate(values)
    except ValueError as error:
        raise UserError(f"the config does not fit {world_size} ranks: {error}", where="deepspeed launcher", fix="start fewer ranks") from None


def _join() -> Rank:
    world_size = launched_world_size()
    if world_size is None:
        return start_process_group(0, 1, 0, "127.0.0.1", free_port())
    place = {name: os.environ.get(name, default) for name, default in (("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500"))}
    return start_process_group(int(os.environ["RANK"]), world_size, int(place["LOCAL_RANK"]), place["MASTER_ADDR"], int(place["MASTER_PORT"]))


def _prepare(config: PPOConfig) -> Path:
    check_run(config)
    return RunFolder.create(config.run.output_dir, config.run.name, config.run.overwrite).root
