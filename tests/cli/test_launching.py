"""The launcher of the config is the one that runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.cli import ray_launch, spmd_launch
from rlhf_dist.cli.launching import launch, with_a_token
from rlhf_dist.config.ppo import PPOConfig


@pytest.mark.parametrize(("launcher", "expected"), [("spmd", (Path("spmd"), False)), ("ray", (Path("ray"), True))])
def test_the_launcher_is_that_of_the_config(
    ppo_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, launcher: str, expected: tuple[Path, bool]
) -> None:
    monkeypatch.setattr(spmd_launch, "run_under_launcher", lambda program: (Path("spmd"), False))
    monkeypatch.setattr(ray_launch, "run_under_ray", lambda program: Path("ray"))
    assert launch(PPOConfig.model_validate(ppo_values | {"placement": {"launcher": launcher}})) == expected


def test_a_cluster_of_its_own_asks_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once; not where Ray is loaded already, where another cluster is joined, or where the user has chosen."""
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS")
    for name in names:
        monkeypatch.setenv(name, "")  # so that what is set here goes again
        monkeypatch.delenv(name)
    with_a_token()
    assert not set(names) & set(os.environ), "Ray is loaded here"
    monkeypatch.delitem(sys.modules, "ray")
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    with_a_token()
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with_a_token()
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.delenv("RAY_AUTH_MODE")
    with_a_token()
    token = os.environ["RAY_AUTH_TOKEN"]
    with_a_token()
    assert os.environ["RAY_AUTH_MODE"] == "token" and os.environ["RAY_AUTH_TOKEN"] == token and len(token) == 64
