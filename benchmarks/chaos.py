"""Does a run that is killed again and again end with the weights of an undisturbed one? And what does each kind of death cost?

A tiny PPO run under Ray (policy on two ranks, ZeRO 2), undisturbed and then with SIGKILLs that a seed draws: whom (a rank of a role, the
coordinator, everything from the driver to Ray's own processes), at which call of which step, before it is sent or while it is worked on.
A driver that was killed is started again with `run.resume=auto`.

    python benchmarks/chaos.py --kills 50

Printed and kept: by victim, how many deaths there were, how many were missed (one that has nothing more to do may not be), and the seconds
that the run stood still for them (median, lowest to highest); whether the final weights are equal bit for bit; whether each sample of each
step was trained on exactly once in the lineage that led there.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from manifest import RESULTS, manifest, spread, write
from rich.console import Console
from rich.table import Table
from sabotage import COORDINATOR, EVERYTHING, Kill, Log
from workload import Shape, save_models

SHAPE = Shape(hidden=64, layers=2, vocabulary=64)
PROMPTS, SAMPLES, EVERY = 8, 2, 2
LIMIT_S = 3600.0


def main(
    kills: Annotated[int, typer.Option(help="deaths")] = 50,
    steps: Annotated[int, typer.Option(help="PPO steps of the run")] = 26,
    seed: Annotated[int, typer.Option(help="of the deaths")] = 0,
    stale: Annotated[bool, typer.Option(help="with a rollout group, one step stale")] = False,
    results: Annotated[Path, typer.Option(help="folder of the JSON")] = RESULTS,
) -> None:
    """Runs both, compares them, prints a table."""
    with tempfile.TemporaryDirectory() as temporary:
        calm, wild = Path(temporary) / "calm", Path(temporary) / "wild"
        models = save_models(Path(temporary), SHAPE)
        for folder, plan in ((calm, []), (wild, plan_kills(kills, steps, seed, stale))):
            write_run(folder, models, steps, plan, stale=stale)
            drive(folder, LIMIT_S)
        events = Log(wild).read()
        report = {"manifest": asdict(manifest("chaos", {"steps": steps, "kills": kills, "seed": seed, "stale": stale}, 1, "cpu"))}
        report |= verdict(calm / "run", wild / "run", steps) | {"deaths": deaths(events)}
    console = Console(width=110)
    console.print(table(report["deaths"]))
    console.print({name: value for name, value in report.items() if name not in ("manifest", "deaths")})
    path = write("chaos_stale" if stale else "chaos", report, results)
    console.print(f"kept in {path}", soft_wrap=True)


def plan_kills(count: int, steps: int, seed: int, stale: bool) -> list[Kill]:
    """Deaths over all roles and calls, no two at the same call."""
    draw = random.Random(seed)
    sampler = "rollout" if stale else "policy"
    victims = ["policy 0", "policy 1", "value 0", "reference 0", "reward 0", COORDINATOR, EVERYTHING]
    victims += ["rollout 0"] if stale else []
    sync = "policy.send_weights" if stale else "policy.sync_weights"
    calls = [(f"{sampler}.generate", 1), ("reference.score", 1), ("reward.judge", 1), ("value.score", 1), ("policy.score", 1)]
    calls += [("policy.estimate", 1), ("policy.load_experience", 1), ("policy.update", 4), ("value.update", 4), (sync, 1)]
    calls += [("policy.write_rollouts", 1), ("policy.begin_save", 1), ("value.begin_save", 1), ("policy.saved", 1)]
    places = [
        (step, call, nth)
        for step in range(steps)
        for call, times in calls
        for nth in range(times)
        # A save belongs to the phase that the step before it ended with; the last step takes none.
        if not (call.endswith(("_save", ".saved")) and ((step + 1) % EVERY or step + 1 >= steps))
    ]
    chosen = sorted(draw.sample(places, count))
    drawn = [victims[number % len(victims)] for number in range(count)]
    draw.shuffle(drawn)
    delays = [draw.choice((-1.0, draw.uniform(0.0, 0.1))) for _ in range(count)]
    return [Kill(n, *place, victim, delay) for n, (place, victim, delay) in enumerate(zip(chosen, drawn, delays, strict=True))]


def write_run(folder: Path, models: tuple[str, str], steps: int, plan: Sequence[Kill], *, stale: bool) -> None:
    """The config of a run and its deaths."""
    folder.mkdir(parents=True)
    draw = random.Random(7)
    texts = [" ".join(f"t{draw.randrange(3, SHAPE.vocabulary)}" for _ in range(draw.randrange(2, 7))) for _ in range(64)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    (folder / "rewards.py").write_text(REWARD, encoding="utf-8")
    (folder / "zero2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}), encoding="utf-8")
    trained = {"optim": {"lr": 1e-3}}
    values: dict[str, Any] = {
        "run": {"name": "run", "output_dir": str(folder), "steps": steps, "resume": "auto"},
        "data": {"train": str(folder / "prompts.jsonl"), "max_prompt_tokens": 16, "eval_fraction": 0.1},
        "policy": {"model": models[0], "ranks": 2, "deepspeed": str(folder / "zero2.json")} | trained,
        "value": {"model": models[1], "head_init": "keep"} | trained,
        "reward": {"sources": [{"kind": "function", "name": "even", "path": f"{folder / 'rewards.py'}:even", "normalise": "standardise"}]},
        "rollout": {"prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES, "max_new_tokens": 12, "slots": 8},
        "algorithm": {"epochs": 2, "minibatches": 2, "kl": {"adaptive": True}},
        "evaluation": {"every": 5},
        "checkpoint": {"every": EVERY},
        "placement": {"restarts": 20, "heartbeat_s": 2.0, "heartbeat_timeout_s": 30.0},
    }
    if stale:
        values["rollout"] |= {"ranks": 1, "max_staleness": 1}
    (folder / "ppo.yaml").write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    (folder / "kills.json").write_text(json.dumps([asdict(kill) for kill in plan]), encoding="utf-8")


REWARD = """def even(prompts, completions, **columns):
    words = [[int(word[1:]) for word in text.split() if word[1:].isdigit()] for text in completions]
    return [sum(number % 2 == 0 for number in numbers) / (1 + len(numbers)) for numbers in words]
"""


def drive(folder: Path, limit_s: float) -> None:
    """Starts the driver until it ends by itself.

    Raises:
        RuntimeError: it ended with an error, or not in time.
    """
    began = time.monotonic()
    while True:
        with (folder / "driver.log").open("a", encoding="utf-8") as log:
            driver = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("sabotage.py")), str(folder)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(),
            )
            status = driver.wait(timeout=max(limit_s - (time.monotonic() - began), 1))
        if status == 0:
            return
        if status != -9:
            raise RuntimeError(f"the driver ended with {status}:\n" + (folder / "driver.log").read_text(encoding="utf-8")[-4000:])


def _environment() -> dict[str, str]:
    return dict(os.environ) | {
        "RAY_DEDUP_LOGS": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])),
    }


def verdict(calm: Path, wild: Path, steps: int) -> dict[str, Any]:
    """What must be the same in both runs."""
    from rlhf_dist.runs.metrics import read_metrics
    from rlhf_dist.runs.rollout_log import read_rollouts

    def samples(root: Path, step: int) -> list[tuple[Any, ...]]:
        rows = read_rollouts(root / "rollouts" / f"step_{step:06d}.parquet").to_pylist()
        return [(row["prompt_id"], row["sample_index"], row["completion"], row["score"], row["policy_version"]) for row in rows]

    weights = {
        role: (calm / "export" / role / "model.safetensors").read_bytes() == (wild / "export" / role / "model.safetensors").read_bytes()
        for role in ("policy", "value")
    }
    lines = Counter(line["step"] for line in read_metrics(wild / "metrics.jsonl"))
    once = all(len(set(samples(wild, step))) == len(samples(wild, step)) == PROMPTS * SAMPLES for step in range(1, steps + 1))
    return {
        "weights_equal": weights,
        "samples_equal": all(samples(calm, step) == samples(wild, step) for step in range(1, steps + 1)),
        "each_sample_once": once and lines == Counter(range(steps + 1)),
    }


def deaths(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each death with the seconds that the run stood still for it, and how it came back."""
    found = []
    for number, event in enumerate(events):
        if event["kind"] == "kill":
            named = {name: event[name] for name in ("victim", "call", "step", "delay_s")}
            found.append(named | _way_back(event, events[number + 1 :]))
    return found


def _way_back(death: dict[str, Any], later: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """From the death, or from the last progress before anybody missed the dead, until the run is at work again."""
    since, how = death["time"], ""
    for event in later:
        text = event.get("text", "")
        if text.startswith("recovering in"):
            how = ""
        elif text.startswith("recovered in"):
            how = text.partition(": ")[2]
        elif event["kind"] == "starts":
            how = f"started again after step {event['step']}"
        elif not how and event["kind"] in ("begins", "done"):
            since = event["time"]
        healed = how.startswith("rebuilt") and "back to" not in how
        if how and (healed or event["kind"] == "begins" or text.startswith("preflight passed")):
            return {"how": how, "seconds": event["time"] - since}
    return {"how": how or "nobody missed it", "seconds": None}


def table(found: Sequence[dict[str, Any]]) -> Table:
    """By victim."""
    by_victim = defaultdict(list)
    for death in found:
        by_victim[death["victim"]].append(death)
    shown = Table("victim", "deaths", "missed", "seconds until it works again", "rolled back")
    for victim, them in sorted(by_victim.items()):
        seconds = [death["seconds"] for death in them if death["seconds"] is not None]
        rolled = sum("back to" in death["how"] for death in them)
        shown.add_row(victim, str(len(them)), str(len(seconds)), spread(seconds).text(1) if seconds else "", str(rolled))
    return shown


if __name__ == "__main__":
    typer.run(main)
