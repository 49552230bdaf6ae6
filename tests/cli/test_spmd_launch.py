from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlhf_dist.cli import programs, spmd_launch
from rlhf_dist.cli.programs import PPOProgram
from rlhf_dist.cli.spmd_launch import run_under_launcher, spanning_all_ranks, spmd_groups
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.engines.process import Rank

HERE = Rank(0, 1, 0, "cpu")


def program(values: dict[str, Any]) -> PPOProgram:
    return PPOProgram(PPOConfig.model_validate(values))


class Closed:
    def __init__(self, role: str, worker: Any, rank: Rank) -> None:
        self.name, self.worker, self.closed = role, worker, False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Closed]:
    groups: list[Closed] = []
    monkeypatch.setattr(programs, "build_worker", lambda role, config, rank: f"{role} worker")
    monkeypatch.setattr(spmd_launch, "SpmdGroup", lambda *given: groups.append(Closed(*given)) or groups[-1])
    return groups


def test_groups_are_those_that_the_run_needs_and_end_with_it(ppo_values: dict[str, Any], made: list[Closed]) -> None:
    with pytest.raises(KeyError), spmd_groups(program(ppo_values), HERE) as groups:
        assert list(groups) == ["policy", "reference", "value", "reward"]
        raise KeyError
    assert len(made) == 4 and all(group.closed for group in made)
    del made[:]
    small = program(ppo_values | {"algorithm": {"estimator": "rloo"}, "policy": ppo_values["policy"] | {"lora": {}}})
    with spmd_groups(small, HERE) as groups:
        assert list(groups) == ["policy", "reward"]


def test_groups_that_were_made_end_when_another_cannot_be(
    ppo_values: dict[str, Any], made: list[Closed], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(role: str, config: PPOConfig, rank: Rank) -> str:
        if role == "value":
            raise UserError("no such value model")
        return role

    monkeypatch.setattr(programs, "build_worker", build)
    with pytest.raises(UserError, match="no such value model"), spmd_groups(program(ppo_values), HERE):
        raise AssertionError("not reached")
    assert [group.name for group in made if group.closed] == ["policy", "reference"]


def test_every_engine_spans_all_ranks(ppo_values: dict[str, Any]) -> None:
    spanning = spanning_all_ranks(program(ppo_values), 4)
    config = spanning.config
    assert {config.policy.ranks, config.reference.ranks, config.value.ranks, config.reward.ranks} == {4}
    assert spanning_all_ranks(spanning, 1).config == PPOConfig.model_validate(ppo_values)


def test_more_ranks_than_the_config_has_work_for(ppo_values: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"^the config does not fit 9 ranks: rollout.prompts_per_step is smaller than policy.ranks"
    ) as error:
        spanning_all_ranks(program(ppo_values), 9)
    assert error.value.fix == "start fewer ranks" and "pydantic" not in str(error.value)


@pytest.mark.parametrize("launched", [{}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1"}])
def test_one_plain_process_is_rank_0_of_1(ppo_values: dict[str, Any], launched: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an earlier run in this process, or a launcher, left its variables behind: a port of its own is taken."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    root, first = run_under_launcher(program(ppo_values | {"run": ppo_values["run"] | {"steps": 1}}))
    assert (root, first) == (Path(ppo_values["run"]["output_dir"]) / "test", True)
    assert (root / "summary.json").is_file()
    assert not dist.is_initialized()


def test_a_fault_leaves_no_process_group_and_room_for_the_next_try(
    ppo_values: dict[str, Any], reward_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = program(ppo_values | {"run": ppo_values["run"] | {"steps": 1}})
    build = programs.build_worker

    def failing(role: str, *given: Any) -> Any:
        if role == "reward":
            raise UserError("a reward model without weights")
        return build(role, *given)

    monkeypatch.setattr(programs, "build_worker", failing)
    with pytest.raises(UserError, match="without weights"):
        run_under_launcher(config)
    assert not dist.is_initialized()
    monkeypatch.setattr(programs, "build_worker", build)
    run_under_launcher(config)  # no run.overwrite needed
    with pytest.raises(UserError, match="exists and is not empty"):
        run_under_launcher(config)


def test_a_rank_has_the_threads_of_the_config_and_gives_them_back(ppo_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def failing(role: str, *given: Any) -> Any:
        seen.append(torch.get_num_threads())
        raise UserError("enough seen")

    monkeypatch.setattr(programs, "build_worker", failing)
    before = torch.get_num_threads()
    for threads in (1, 2):
        with pytest.raises(UserError, match="enough seen"):
            run_under_launcher(program(ppo_values | {"placement": {"launcher": "spmd", "threads_per_rank": threads}}))
    assert seen == [1, 2] and torch.get_num_threads() == before


def test_ranks_that_the_config_names_for_elsewhere_do_not_count_here(ppo_values: dict[str, Any]) -> None:
    """A config written for 64 ranks runs in one plain process, with a small batch to look at."""
    values = ppo_values | {"policy": ppo_values["policy"] | {"ranks": 64}}
    config = spanning_all_ranks(program(values), 1).config
    assert (config.policy.ranks, config.rollout.prompts_per_step, config.placement.launcher) == (1, 8, "spmd")
    with pytest.raises(UserError, match="does not fit 9 ranks"):
        spanning_all_ranks(program(values), 9)
