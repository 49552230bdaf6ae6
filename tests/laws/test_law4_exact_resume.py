"""Law 4: a run that is killed at any phase boundary and begun again ends with the weights of an undisturbed one, bit for bit.

Real deaths (SIGKILL) of one plain process; `tests/distributed` has those of Ray's processes and of several ranks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from rlhf_dist.cli.main import main
from rlhf_dist.runs.metrics import read_metrics
from rlhf_dist.runs.rollout_log import read_rollouts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MORTAL = Path(__file__).parent / "programs" / "mortal.py"
BESIDE = ("perf/", "time", "coordinator/", "weight_sync/seconds")
"""Metrics of how the run went, not of what it learnt: seconds, bytes through the coordinator, recoveries."""
KILLED = -9
PPO_STEPS = 6
Death = tuple[int, str]

EVERYWHERE: list[Death] = [
    (0, "recorder.metrics"),  # before anything is recorded
    (0, "policy.generate"),
    (0, "reference.score"),
    (0, "value.update 2"),  # nothing was saved yet: back to the beginning
    (1, "recorder.begin_checkpoint"),
    (1, "policy.begin_save"),
    (1, "value.begin_save"),
    (2, "policy.saved"),  # of the checkpoint after step 1, which is written while step 2 is made
    (2, "recorder.commit_checkpoint"),
    (2, "recorder.commit_checkpoint after"),
    (1, "reward.judge"),
    (1, "policy.score"),
    (2, "value.score"),
    (2, "policy.estimate"),
    (2, "policy.estimate after"),
    (2, "policy.load_experience after"),
    (3, "policy.update"),
    (3, "value.update"),
    (3, "policy.update 2"),
    (3, "policy.update 4"),
    (3, "value.update 4 after"),
    (4, "policy.sync_weights"),
    (4, "policy.sync_weights after"),
    (4, "policy.write_rollouts"),
    (4, "policy.write_rollouts after"),
    (4, "recorder.metrics"),
    (4, "recorder.metrics after"),
    (6, "policy.export"),
    (6, "value.export after"),
    (6, "recorder.summary"),
]
"""Steps done, and the call before (or after) which the process dies: before and after every phase, each minibatch, the save."""


@pytest.fixture(scope="module")
def lives(
    tiny_run: Callable[[Path], dict[str, Any]], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[list[Any]]]]:
    """All runs of this file: their folder, and by name the deaths that happened."""
    root = tmp_path_factory.mktemp("law4")
    jobs = jobs_of(root, tiny_run, tiny_model)
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run([sys.executable, str(MORTAL), str(root / "jobs.json")], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    happened = json.loads(done.stdout.strip().splitlines()[-1])
    return root, {job["values"]["run"]["name"]: deaths for job, deaths in zip(jobs, happened, strict=True)}


def jobs_of(root: Path, tiny_run: Callable[[Path], dict[str, Any]], model: Path) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = []

    def add(stage: str, name: str, values: dict[str, Any], deaths: list[Death], **options: Any) -> None:
        for each, dies in ((f"{name}_calm", []), (name, deaths)) if not options.pop("alone", False) else ((name, deaths),):
            run = values["run"] | {"name": each, "output_dir": str(root), "resume": "auto"}
            jobs.append({"stage": stage, "values": json.loads(json.dumps(values | {"run": run})), "deaths": dies} | options)

    plain = tiny_run(root)
    plain["run"]["steps"] = PPO_STEPS
    plain["reward"]["sources"][0]["normalise"] = "standardise"
    plain |= {"checkpoint": {"every": 1}, "evaluation": {"every": 2}}
    plain["algorithm"]["kl"] = {"adaptive": True}
    add("ppo", "gae", plain, EVERYWHERE)
    short = plain | {"run": plain["run"] | {"steps": 4}, "checkpoint": {"every": 2, "keep": 3, "asynchronous": False}}
    reinforce = short | {"algorithm": {"estimator": "reinforce", "minibatches": 2}, "rollout": plain["rollout"] | {"shards_per_rank": 2}}
    add(
        "ppo",
        "reinforce",
        reinforce,
        [(1, "policy.update"), (2, "recorder.commit_checkpoint"), (3, "policy.generate"), (4, "policy.export")],
    )
    stale = short | {"rollout": plain["rollout"] | {"max_staleness": 2}}
    add("ppo", "stale", stale, [(1, "policy.generate"), (2, "policy.save_rollouts"), (2, "policy.update"), (3, "policy.sync_weights")])
    often = short | {"checkpoint": {"every": 1, "keep": 3, "asynchronous": False}}
    add("ppo", "damaged", often, [(3, "policy.sync_weights")], damage="checkpoints/step_000003/policy/*", alone=True)
    add("ppo", "gutted", often, [(3, "policy.sync_weights")], damage="checkpoints/step_000003/manifest.json", alone=True)
    add("ppo", "stopped", often, [], stop=2, alone=True)

    rows = [{"prompt": f"w{n} w{n * 7 % 60}", "completion": f" w{n * 3 % 60} w{n * 5 % 60}"} for n in range(40)]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": f" w{n * 11 % 60}"} for n, row in enumerate(rows)]
    for name, records in (("rows", rows), ("pairs", pairs)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    deaths: list[Death] = [(0, "model.describe after"), (1, "model.update"), (3, "model.saved"), (3, "model.update after")]
    deaths += [(4, "model.update"), (6, "model.export")]
    for stage, data in (("sft", "rows"), ("dpo", "pairs"), ("reward", "pairs")):
        values = {
            "run": {"seed": 5},
            "data": {"train": str(root / f"{data}.jsonl"), "eval_fraction": 0.2, "max_tokens": 32},
            "model": {"model": str(model), "optim": {"lr": 3e-3}},
            "training": {"epochs": 2, "batch_size": 12, "evaluate_every": 2},
            "checkpoint": {"every": 2},
            "placement": {"launcher": "spmd"},
        }
        add(stage, stage, values, deaths)
    return jobs


def weights(root: Path, name: str) -> dict[str, bytes]:
    found = {str(path.relative_to(root / name)): path.read_bytes() for path in sorted((root / name / "export").rglob("*.safetensors"))}
    assert found, (root / f"{name}.log").read_text()[-3000:]
    return found


def curve(root: Path, name: str) -> list[dict[str, Any]]:
    lines = read_metrics(root / name / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.startswith(BESIDE)} for line in lines]


def assert_same_run(root: Path, one: str, other: str) -> None:
    """Metrics first: they tell where two runs part."""
    first, second = curve(root, one), curve(root, other)
    assert [line["step"] for line in first] == [line["step"] for line in second], "each step stands there once"
    for a, b in zip(first, second, strict=True):
        assert {key: (value, b.get(key)) for key, value in a.items() if value != b.get(key)} == {} and a.keys() == b.keys()
    assert weights(root, one) == weights(root, other)
    for kind in ("rollouts", "evaluation"):
        names = [[path.name for path in sorted((root / run / kind).glob("*.parquet"))] for run in (one, other)]
        assert names[0] == names[1]
        for name in names[0]:
            assert read_rollouts(root / one / kind / name).equals(read_rollouts(root / other / kind / name)), name
    summaries = [json.loads((root / run / "summary.json").read_text()) for run in (one, other)]
    for key in ("held_out", "kl", "dropped", "steps", "optimizer_steps", "best_step", "best", "before", "after", "rows"):
        assert summaries[0].get(key) == summaries[1].get(key), key


@pytest.mark.parametrize("name", ["gae", "reinforce", "stale", "sft", "dpo", "reward"])
def test_a_run_that_died_again_and_again_is_the_run_that_did_not(lives: Any, name: str) -> None:
    root, happened = lives
    said = (root / f"{name}.log").read_text()
    assert happened[f"{name}_calm"] == [["ended", 0]], (root / f"{name}_calm.log").read_text()[-3000:]
    assert all(status == KILLED for *_, status in happened[name][:-1]) and happened[name][-1] == ["ended", 0], (
        happened[name],
        said[-3000:],
    )
    assert "resumed after step" in said
    assert_same_run(root, f"{name}_calm", name)


@pytest.mark.parametrize("name", ["damaged", "gutted"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(lives: Any, name: str) -> None:
    root, happened = lives
    said = (root / f"{name}.log").read_text()
    assert happened[name][-1] == ["ended", 0], said[-3000:]
    assert "checkpoint step_000003 is damaged and not used" in said and "resumed after step 2" in said
    weights(root, name)
    assert [line["step"] for line in curve(root, name)] == [0, 1, 2, 3, 4]


def test_the_damage_of_a_checkpoint_changes_no_result(lives: Any) -> None:
    root, _ = lives
    assert_same_run(root, "damaged", "gutted")
    four = load_file(root / "damaged" / "export" / "policy" / "model.safetensors")
    assert four and curve(root, "damaged")[:4] == curve(root, "gae_calm")[:1] + curve(root, "damaged")[1:4]


def command(root: Path, name: str, *changes: str) -> None:
    values = yaml.safe_load((root / name / "config.yaml").read_text())
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    main(["ppo", "--config", str(path), "run.resume=auto", *changes])


def test_a_run_that_is_over_is_not_begun_again(lives: Any, capsys: pytest.CaptureFixture[str]) -> None:
    root, _ = lives
    before = (root / "reinforce" / "metrics.jsonl").read_bytes()
    command(root, "reinforce")
    assert "the run is over already" in capsys.readouterr().out
    assert (root / "reinforce" / "metrics.jsonl").read_bytes() == before


def test_other_settings_are_refused_by_key_and_the_right_ones_go_on(lives: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked to stop after two steps, its state was saved; what may change is said, and the result is that of a run in one go."""
    root, happened = lives
    assert happened["stopped"] == [["ended", 0]] and not (root / "stopped" / "summary.json").exists()
    with pytest.raises(SystemExit) as ended:
        command(root, "stopped", "algorithm.clip_low=0.3", "policy.optim.lr=0.5")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "the run cannot go on with other settings" in said
    assert "algorithm.clip_low: 0.2, now 0.3" in said and "policy.optim.lr: 0.001, now 0.5" in said
    before = (root / "stopped" / "metrics.jsonl").read_bytes()
    assert [line["step"] for line in curve(root, "stopped")] == [0, 1, 2]
    command(root, "stopped", "checkpoint.every=3", "placement.restarts=7")
    assert "going on with another setting: placement.restarts: 3, now 7" in capsys.readouterr().out
    assert (root / "stopped" / "metrics.jsonl").read_bytes().startswith(before)
    assert_same_run(root, "damaged", "stopped")


def test_auto_begins_where_there_is_nothing(lives: Any) -> None:
    """Every calm run of this file was begun with run.resume=auto in an empty folder."""
    root, _ = lives
    assert "resumed" not in (root / "gae_calm.log").read_text()
