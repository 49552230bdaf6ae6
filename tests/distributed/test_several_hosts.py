"""Two hosts on one machine (network namespaces joined by a cable): a run trains across them, and heals when one is cut off.

The disk is the same for both, as shared storage is in a cluster. Needs root; skipped with the reason where namespaces cannot be made.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_dist.runs.metrics import read_metrics
from rlhf_dist.runs.rollout_log import read_rollouts

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
CABLE = "cable0"
HEAD, OTHER = "10.77.31.1", "10.77.31.2"
STEPS, LIMIT_S = 8, 300.0


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"network namespaces cannot be made here: ip {' '.join(words)}: {done.stderr.strip()}")


class Hosts:
    """Two hosts with an address each; `run` starts a command on one of them."""

    def __init__(self) -> None:
        self.names = tuple(f"rlhf{os.getpid()}{letter}" for letter in "ab")
        self._ray = tempfile.mkdtemp(prefix="hosts", dir="/tmp")  # short: the paths of Ray's sockets have a limit
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": CABLE,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": f"{HEAD}:6379",
            "RAY_health_check_initial_delay_ms": "2000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "4",
        }

    def connect(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", CABLE, "netns", self.names[0], "type", "veth", "peer", "name", CABLE, "netns", self.names[1])
        for name, address in zip(self.names, (HEAD, OTHER), strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", CABLE)
            ip("-n", name, "link", "set", CABLE, "up")

    def start_ray(self) -> None:
        ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--disable-usage-stats", "--block"]
        head = ["--head", f"--node-ip-address={HEAD}", "--port=6379", "--num-cpus=6", "--include-dashboard=false"]
        self.run(0, *ray, *head, f"--temp-dir={self._ray}", log="head.log")
        self._wait_for("GCS", lambda: "Ray runtime started" in (Path(self._ray) / "head.log").read_text())
        self.run(1, *ray, f"--address={HEAD}:6379", f"--node-ip-address={OTHER}", "--num-cpus=4", log="other.log")
        self._wait_for("the other host", lambda: "Ray runtime started" in (Path(self._ray) / "other.log").read_text())

    def run(self, host: int, *command: str, log: str) -> subprocess.Popen[bytes]:
        with (Path(self._ray) / log).open("wb") as file:
            words = ["ip", "netns", "exec", self.names[host], *command]
            return subprocess.Popen(words, env=self._environment, stdout=file, stderr=subprocess.STDOUT)

    def said(self, log: str) -> str:
        return (Path(self._ray) / log).read_text()

    def processes(self, host: int) -> list[psutil.Process]:
        listed = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True).stdout.split()
        return [psutil.Process(int(number)) for number in listed if psutil.pid_exists(int(number))]

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", CABLE, "down")

    def close(self) -> None:
        for host, name in enumerate(self.names):
            for process in self.processes(host):
                process.send_signal(signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        shutil.rmtree(self._ray, ignore_errors=True)

    def _wait_for(self, what: str, there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not there():
            assert time.monotonic() < deadline, f"{what} did not start"
            time.sleep(0.3)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the command `ip`")
    made = Hosts()
    try:
        made.connect()
        made.start_ray()
        yield made
    finally:
        made.close()


def begin(hosts: Hosts, values: dict[str, Any], root: Path, name: str) -> subprocess.Popen[bytes]:
    """Policy on two ranks, one a host where there are two; the rest wherever there is room. It is its own reference: a process less."""
    values = json.loads(json.dumps(values))
    (root / "zero2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    values["run"] |= {"name": name, "output_dir": str(root), "steps": STEPS}
    values["policy"] |= {"ranks": 2, "deepspeed": str(root / "zero2.json"), "lora": {"r": 4}}
    values["checkpoint"] = {"every": 2}
    values["placement"] = {"launcher": "ray", "strategy": "SPREAD", "heartbeat_s": 1.0, "heartbeat_timeout_s": 5.0}
    (root / f"{name}.yaml").write_text(json.dumps(values))  # JSON is YAML
    command = [sys.executable, "-m", "rlhf_dist.cli.main", "ppo", "--config", str(root / f"{name}.yaml")]
    return hosts.run(0, *command, log=f"{name}.log")


def test_a_run_trains_across_hosts_and_heals_when_one_is_cut_off(
    hosts: Hosts, tiny_run: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    values = tiny_run(tmp_path)
    assert begin(hosts, values, tmp_path, "calm").wait(timeout=LIMIT_S) == 0, hosts.said("calm.log")[-3000:]

    cut, metrics, deadline = begin(hosts, values, tmp_path, "cut"), tmp_path / "cut" / "metrics.jsonl", time.monotonic() + LIMIT_S
    while not metrics.is_file() or len(read_metrics(metrics)) < 4:
        assert cut.poll() is None and time.monotonic() < deadline, hosts.said("cut.log")[-3000:]
        time.sleep(0.05)
    ranks = [process for process in hosts.processes(1) if process.name().startswith("ray::Host")]
    assert ranks, "a part of the run is at work on the other host"
    hosts.cut()
    assert cut.wait(timeout=LIMIT_S) == 0, hosts.said("cut.log")[-3000:]

    said = hosts.said("cut.log")
    assert "recovered in " in said and "rebuilt policy" in said, said[-3000:]
    for role in ("policy", "value"):
        files = [tmp_path / run / "export" / role / "model.safetensors" for run in ("calm", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes(), role
    assert [line["step"] for line in read_metrics(metrics)] == list(range(STEPS + 1))
    for step in range(1, STEPS + 1):
        tables = [read_rollouts(tmp_path / run / "rollouts" / f"step_{step:06d}.parquet") for run in ("calm", "cut")]
        assert tables[0].equals(tables[1])
