"""The launcher of the config is the one that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.cli import ray_launch, spmd_launch
from rlhf_dist.cli.launching import launch
from rlhf_dist.config.ppo import PPOConfig


@pytest.mark.parametrize(("launcher", "expected"), [("spmd", (Path("spmd"), False)), ("ray", (Path("ray"), True))])
def test_the_launcher_is_that_of_the_config(
    ppo_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, launcher: str, expected: tuple[Path, bool]
) -> None:
    monkeypatch.setattr(spmd_launch, "run_under_launcher", lambda program: (Path("spmd"), False))
    monkeypatch.setattr(ray_launch, "run_under_ray", lambda program: Path("ray"))
    assert launch(PPOConfig.model_validate(ppo_values | {"placement": {"launcher": launcher}})) == expected
