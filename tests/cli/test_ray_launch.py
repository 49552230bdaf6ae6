"""PPO under Ray from the command line: what can never be placed is refused, faults arrive whole, nothing is left running."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from rlhf_dist.cli import ray_launch
from rlhf_dist.cli.interrupts import Interrupted
from rlhf_dist.cli.paths import with_absolute_paths
from rlhf_dist.cli.programs import PPOProgram
from rlhf_dist.cli.ray_launch import cluster_nodes, run_under_ray
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig

pytestmark = pytest.mark.distributed


def config(values: dict[str, Any], **changes: Any) -> PPOConfig:
    values["placement"] = {"launcher": "ray"}
    for role in ("policy", "value", "reference", "reward"):
        values.setdefault(role, {})["cpus_per_rank"] = 0.5
    for path, value in changes.items():
        section, key = path.split("__")
        values[section][key] = value
    return with_absolute_paths(PPOConfig.model_validate(values))


def test_the_clusters_nodes_are_seen(ray_session: None) -> None:
    assert [node.cpus for node in cluster_nodes()] == [16]


@pytest.mark.parametrize(("offload", "order"), [("none", "bbbbffff"), ("idle", "bfbfbfbf")])
def test_groups_that_share_devices_by_turns_load_by_turns(
    ppo_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, offload: str, order: str
) -> None:
    seen: list[str] = []

    class Group:
        def __init__(self, demand: Any, factory: Any, placement: Any, label: str) -> None:
            pass

        def begin_start(self) -> None:
            seen.append("b")

        def finish_start(self) -> None:
            seen.append("f")

        def close(self) -> None:
            pass

    monkeypatch.setattr(ray_launch, "RayGroup", Group)
    with ray_launch.ray_groups(PPOProgram(config(ppo_values, placement__offload=offload))) as groups:
        assert len(groups) == 4 and "".join(seen) == order


def test_ctrl_c_names_the_run_folder(ray_session: None, ppo_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ray_launch, "_follow", interrupted)
    with pytest.raises(Interrupted) as caught:
        run_under_ray(PPOProgram(config(ppo_values)))
    assert caught.value.root == Path(ppo_values["run"]["output_dir"]).absolute() / "test"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference__ranks": 100}, "asks for 51.5 CPUs"),
        ({"value__gpus_per_rank": 1.0}, "asks for 1 GPUs"),
        (
            {"reward__cpus_per_rank": 15.0, "placement__strategy": "STRICT_SPREAD", "reference__ranks": 2},
            "2 ranks of reference need as many nodes",
        ),
    ],
)
def test_what_can_never_be_placed_is_refused_in_seconds(
    ray_session: None, ppo_values: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    began = time.monotonic()
    if "reward__cpus_per_rank" in changes:
        changes = changes | {"reward__cpus_per_rank": 1.0}
    with pytest.raises(UserError, match=message):
        run_under_ray(PPOProgram(config(ppo_values, **changes)))
    assert time.monotonic() - began < 10
    assert not Path(ppo_values["run"]["output_dir"]).exists(), "nothing was begun"


@pytest.mark.slow
def test_a_fault_in_the_middle_ends_the_run_with_its_message_and_leaves_no_process(ppo_values: dict[str, Any], tmp_path: Path) -> None:
    """Through the real command: a reward that turns bad in the third call of its process, after the probes."""
    module = tmp_path / "turning.py"
    module.write_text(
        "calls = 0\n"
        "def reward(prompts, completions, **columns):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return [float('nan') if calls > 2 else 0.5 for _ in completions]\n"
    )
    ppo_values["reward"] = {"sources": [{"name": "turning", "kind": "function", "path": f"{module}:reward"}]}
    ppo_values["algorithm"]["estimator"] = "reinforce"  # a process less
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config(ppo_values).model_dump(mode="json")))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"RLHF_DIST_TEST": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_dist.cli.main", "ppo", "--config", str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "reward 'turning' returned nan for row" in done.stderr and "Traceback" not in done.stderr
    assert orphans(str(tmp_path)) == []


def orphans(mark: str) -> list[str]:
    """Processes that inherited the mark of the run, a few seconds after its end."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        found = [process.name() for process in psutil.process_iter() if environment_of(process).get("RLHF_DIST_TEST") == mark]
        if not found:
            return []
        time.sleep(0.5)
    return found


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}
