"""A config finds its stage, and the stage names the groups it needs."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest

from rlhf_dist.cli.programs import PROGRAMS, PPOProgram, program_of
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.config.stages import STAGES


def test_a_config_finds_its_stage(ppo_values: dict[str, Any]) -> None:
    program = program_of(PPOConfig.model_validate(ppo_values))
    assert isinstance(program, PPOProgram)
    assert [demand.role for demand in program.demands()] == ["policy", "reference", "value", "reward"]
    assert set(program.sections) == {"policy", "reference", "value", "reward"}
    with pytest.raises(KeyError):
        program_of(object())


def test_every_stage_has_a_program() -> None:
    assert set(PROGRAMS) == set(STAGES.values())


def test_it_travels_to_the_coordinators_process(ppo_values: dict[str, Any]) -> None:
    program = program_of(PPOConfig.model_validate(ppo_values))
    again = pickle.loads(pickle.dumps(program))
    assert again.config == program.config
    assert again.factory("value").args == ("value", program.config)


def test_a_rollout_group_is_started_beside_the_engines_and_its_interpreter_is_checked(ppo_values: dict[str, Any]) -> None:
    ppo_values["rollout"] |= {"ranks": 1, "python": "/absent/python"}
    ppo_values["placement"] = {"launcher": "ray"}
    program = program_of(PPOConfig.model_validate(ppo_values))
    assert [demand.role for demand in program.demands()] == ["policy", "reference", "value", "reward", "rollout"]
    assert "rollout" not in program.sections, "the launcher's ranks are those of engines"
    with pytest.raises(UserError, match="it does not run"):
        program.check()


def test_its_check_is_that_of_the_run(ppo_values: dict[str, Any]) -> None:
    assert program_of(PPOConfig.model_validate(ppo_values)).check()["rewards"] == "even"


@pytest.mark.slow
def test_the_coordinators_process_imports_no_models() -> None:
    """It comes into being again after every death, and what it does not import is not waited for."""
    heavy = "import sys, rlhf_dist.cli.programs; print({'transformers', 'peft', 'deepspeed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr[-2000:]
