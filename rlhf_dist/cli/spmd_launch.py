"""PPO inside the processes of the deepspeed launcher (or torchrun), or in one plain process: no Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from pydantic import ValidationError

from rlhf_dist.cli.checks import check_run
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.coordinator.ppo import PPOCoordinator
from rlhf_dist.coordinator.shards import Groups
from rlhf_dist.engines.process import Rank, free_port, launched_world_size, start_process_group, stop_process_group
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.progress import ConsoleReporter, NullReporter
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.workers.roles import build_worker, needed_roles
from rlhf_dist.workers.spmd_group import SpmdGroup, agree


def run_under_launcher(config: PPOConfig) -> tuple[Path, bool]:
    """Runs on this rank; returns the run folder, and whether this is rank 0.

    Raises:
        UserError: anything the user can mend. What only one rank can see is raised there, and the launcher ends the others.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rank = _join()
    try:
        config = spanning_all_ranks(config, rank.world_size)
        root = agree(rank, lambda: _prepare(config))
        recorder = Recorder(RunFolder.open(root) if rank.rank == 0 else None)
        reporter = ConsoleReporter() if rank.rank == 0 else NullReporter()
        with closing(recorder), closing(reporter), spmd_groups(config, rank) as groups:
            PPOCoordinator(config, groups, recorder, reporter).run()
        return root, rank.rank == 0
    finally:
        stop_process_group()


@contextmanager
def spmd_groups(config: PPOConfig, rank: Rank) -> Iterator[Groups]:
    """The run's groups inside this process; they let their models go at the end."""
    groups: dict[str, SpmdGroup] = {}
    try:
        for role in needed_roles(config):
            groups[role] = SpmdGroup(role, build_worker(role, config, rank), rank)
        yield Groups(**groups)  # type: ignore[arg-type]  # a group takes its own kind of handles only
    finally:
        for group in groups.values():
            group.close()


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


def _prepare(config: PPOConfig) -> Path:
    check_run(config)
    return RunFolder.create(config.run.output_dir, config.run.name, config.run.overwrite).root
