"""Images and scripts: pins equal the constraints files, users are not root, scripts parse and run from anywhere."""

import configparser
import json
import os
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = {"cpu": ROOT / "docker" / "Dockerfile.cpu", "cuda": ROOT / "docker" / "Dockerfile.cuda"}
SCRIPTS = [ROOT / ".ci" / "run", *sorted((ROOT / "launch").glob("*.sh"))]
PIN = re.compile(r"([A-Za-z][\w.-]*)==([\w.+]+)")


def requirements(path):
    """The pins of a constraints file, the files it refers to included."""
    for line in path.read_text().splitlines():
        if line.startswith("-c "):
            yield from requirements(path.parent / line[3:].strip())
        elif line and not line.startswith("#"):
            yield Requirement(line)


def pins(path, python="3.11"):
    """Name to version, for one Python."""
    chosen = {}
    for requirement in requirements(path):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            name = requirement.name.lower().replace("_", "-")
            assert name not in chosen, f"{name} is pinned twice for Python {python}"
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            chosen[name] = specifier.version
    return chosen


def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


@pytest.mark.parametrize("kind", DOCKERFILES)
def test_a_version_in_a_dockerfile_is_the_version_of_its_constraints(kind):
    text = DOCKERFILES[kind].read_text()
    constraints = pins(ROOT / f"constraints-{kind}.txt")
    named = PIN.findall(text)
    assert {name for name, _ in named} >= {"torch"}
    for name, number in named:
        assert constraints[name.lower()] == number
    installs = [line for line in text.splitlines() if "pip install" in line and "--no-deps" not in line]
    assert installs and all(f"-c constraints-{kind}.txt" in line for line in installs)


@pytest.mark.parametrize("kind", DOCKERFILES)
def test_an_image_has_a_pinned_base_and_a_user_who_is_not_root(kind):
    lines = DOCKERFILES[kind].read_text().splitlines()
    (base,) = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", base), f"{base} has no full version"
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users and users[-1] not in ("root", "0")
    assert not [line for line in lines if line.startswith("USER root")]


@pytest.mark.parametrize("kind", DOCKERFILES)
def test_what_an_image_copies_exists_and_is_sent_to_the_daemon(kind):
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in DOCKERFILES[kind].read_text().splitlines():
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists() and Path(source).parts[0] in sent, source


def test_both_sets_have_the_same_torch_and_the_cuda_set_adds_only_its_libraries():
    cpu, cuda = pins(ROOT / "constraints-cpu.txt"), pins(ROOT / "constraints-cuda.txt")
    assert cpu.items() <= cuda.items()
    assert all(name.startswith(("nvidia-", "cuda-", "triton")) for name in cuda.keys() - cpu.keys())
    assert "+" not in cpu["torch"]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_every_requirement_is_pinned_within_its_range(python):
    constraints = pins(ROOT / "constraints-cpu.txt", python)
    parser = setup()
    wanted = parser["options"]["install_requires"] + parser["options.extras_require"]["dev"]
    for line in filter(None, map(str.strip, wanted.splitlines())):
        requirement = Requirement(line)
        assert constraints[requirement.name.lower().replace("_", "-")] in requirement.specifier, line


def test_these_tests_run_on_the_pinned_torch_stack_or_within_the_ranges():
    for line in filter(None, map(str.strip, setup()["options"]["install_requires"].splitlines())):
        requirement = Requirement(line)
        assert requirement.specifier.contains(version(requirement.name), prereleases=True), requirement


def test_the_compose_file_opens_ports_to_this_machine_only_and_shares_runs():
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {"head", "worker", "tensorboard"}
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 2 and all(port.startswith("127.0.0.1:") for port in ports)
    for service in services.values():
        assert "../runs:/opt/rlhf_dist/runs" in service["volumes"]
        assert service["build"]["dockerfile"].endswith("docker/Dockerfile.cpu}") and service["image"].endswith("rlhf-dist:cpu}")
        assert "user" not in service and not service.get("privileged")
    assert services["worker"]["command"][:3] == ["ray", "start", "--address=head:6379"]
    json.dumps(services)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_parses_stops_at_errors_and_is_executable(script):
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
    if script.name == "_setup.sh":
        return  # sourced, never run
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK)


PROGRAM = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0")" "$PWD" "$@"
"""


@pytest.fixture
def environment(tmp_path):
    """An environment whose programs print their name, folder and arguments, on a machine without a GPU."""
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("ray", "deepspeed", "rlhf-dist"):
        (programs / name).write_text(PROGRAM)
        (programs / name).chmod(0o755)
    hidden = tmp_path / "no_gpu"
    hidden.mkdir()
    (hidden / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (hidden / "nvidia-smi").chmod(0o755)
    plain = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_JOB_ARGS", "RANKS", "MASTER_PORT")}
    return plain | {"VENV": str(tmp_path / "venv"), "PATH": f"{hidden}:{os.environ['PATH']}"}


def launch(script, *arguments, cwd, env):
    return subprocess.run(["bash", str(ROOT / "launch" / script), *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=30)


def test_a_ray_job_runs_in_the_repository_whatever_the_folder_it_was_sent_from(tmp_path, environment):
    config = tmp_path / "my config.yaml"
    config.write_text("run: {}\n")
    answer = launch("ray_job_submit.sh", config.name, "run.name=a b", cwd=tmp_path, env=environment)
    assert answer.returncode == 0, answer.stderr
    program = f"{environment['VENV']}/bin/rlhf-dist"
    wanted = ["ray", str(tmp_path), "job", "submit", "--address", "http://127.0.0.1:8265", "--", "env", "-C", str(ROOT)]
    assert answer.stdout.splitlines() == [*wanted, program, "ppo", "--config", str(config), "placement.launcher=ray", "run.name=a b"]


def test_the_address_and_further_options_come_from_the_environment(tmp_path, environment):
    (tmp_path / "c.yaml").write_text("")
    env = environment | {"RAY_ADDRESS": "http://10.0.0.1:8265", "RAY_JOB_ARGS": "--no-wait --submission-id x"}
    words = launch("ray_job_submit.sh", "c.yaml", cwd=tmp_path, env=env).stdout.splitlines()
    assert words[4:9] == ["--address", "http://10.0.0.1:8265", "--no-wait", "--submission-id", "x"][:5]


def test_the_deepspeed_launcher_starts_ranks_of_our_module_on_this_machine(tmp_path, environment):
    config = tmp_path / "c.yaml"
    config.write_text("")
    answer = launch(
        "deepspeed_single_node.sh", str(config), "run.steps=2", cwd=tmp_path, env=environment | {"RANKS": "3", "MASTER_PORT": "29511"}
    )
    assert answer.returncode == 0, answer.stderr
    head = ["deepspeed", str(ROOT), "--hostfile", "/dev/null", "--num_gpus", "3", "--master_port", "29511", "--no_local_rank", "--module"]
    tail = ["rlhf_dist.cli.main", "ppo", "--config", str(config), "placement.launcher=spmd", "run.steps=2"]
    assert answer.stdout.splitlines() == head + tail


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
@pytest.mark.parametrize(("script", "launcher"), [("ray_job_submit.sh", "ray"), ("deepspeed_single_node.sh", "spmd")])
def test_the_first_word_may_be_a_stage(script, launcher, stage, tmp_path, environment):
    (tmp_path / "c.yaml").write_text("")
    words = launch(script, stage, "c.yaml", "run.name=x", cwd=tmp_path, env=environment).stdout.splitlines()
    assert words[-5:] == [stage, "--config", str(tmp_path / "c.yaml"), f"placement.launcher={launcher}", "run.name=x"]
    alone = launch(script, stage, cwd=tmp_path, env=environment)
    assert alone.returncode == 2 and alone.stderr.startswith("usage: ") and "[sft|reward|dpo|ppo]" in alone.stderr


@pytest.mark.parametrize("script", ["ray_job_submit.sh", "deepspeed_single_node.sh"])
def test_a_missing_config_is_one_message_and_status_2(script, tmp_path, environment):
    for arguments, words in (([], "usage: "), (["no.yaml"], "there is no config file no.yaml")):
        answer = launch(script, *arguments, cwd=tmp_path, env=environment)
        assert answer.returncode == 2 and answer.stderr.startswith(words) and not answer.stdout
