"""Which part of the machine's limit each phase of a PPO iteration reaches: η = least time / measured time.

First the two ceilings are measured, with the same threads and precision: the best rate of a matrix product (F) and of a copy (W). Then our
loop runs iterations in a plain process (`peers/ours_ppo.py`), the ceilings are measured again between them, and the best of all counts. The
least times are those of `limits.Iteration`: prefill and decode together stand against the measured `generate`.

Tokens are counted as they are needed: padding, a head at a position whose log-prob nobody wants, and anything done twice lower η.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --dtype bfloat16 --rows 64 --hidden 2048 --layers 16 policy.gradient_checkpointing=true
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ceilings import ceilings as measure_ceilings
from limits import Ceilings, Iteration, Lengths
from manifest import Spread, change_suffix, manifest, spread, write
from measuring import here
from options import Options, command
from rich.console import Console
from rich.table import Table
from turns import ours
from workload import Rounds, Rows, Shape, llama_config, make_rows, sampled, save_models, without_head, write_job

from rlhf_dist.config.loading import read_values

PHASES = ("generate", "score", "train")
WIDTHS = {"float32": 4, "bfloat16": 2}


def main(given: Options) -> None:
    """Measures ceilings and iterations and prints a table; the figures go to benchmarks/results/ as JSON."""
    shape, device = given.shape, here()
    work = make_rows(given.rows, given.limit, ragged=given.ragged, vocabulary=shape.vocabulary)
    with tempfile.TemporaryDirectory() as temporary:
        models, rounds = save_models(Path(temporary) / "models", shape), Rounds(given.repeats, given.warm_up)
        job = write_job(Path(temporary) / "run", models, given.workload, work, rounds=rounds, threads=given.threads)
        torch.set_num_threads(given.threads)
        machine = Machine(getattr(torch, given.dtype), device, model_products(shape, work))
        measured = run(job, machine, rounds)
        iteration = work_of(shape, read_values(job.parent / "ours" / "config.yaml"))
    least = iteration.seconds(Lengths(work.prompt_lengths, work.lengths), machine.ceilings, WIDTHS[given.dtype])
    report = summary(least, measured) | {"ceilings": asdict(machine.ceilings), "rates": machine.rates}
    facts = manifest("ours", given.workload | work.facts(), given.threads, device, warm_up=given.warm_up, repeats=given.repeats)
    show(report, given.title(device))
    size = f"{given.lengths}_{device}_{given.dtype}_r{given.rows}_t{given.threads}"
    name = f"roofline_llama{shape.hidden}x{shape.layers}_{size}{change_suffix(given.overrides)}"
    write(name, report | {"manifest": asdict(facts)}, given.results)


class Machine:
    """Its ceilings, the best of every look at them."""

    def __init__(self, dtype: torch.dtype, device: str, products: tuple[tuple[int, int, int], ...]) -> None:
        self._given = (dtype, device, products)
        self.rates: dict[str, float] = {}
        self.look()

    def look(self) -> None:
        """Measures them once more."""
        _, rates = measure_ceilings(*self._given)
        self.rates = {name: max(rate, self.rates.get(name, 0.0)) for name, rate in rates.items()}

    @property
    def ceilings(self) -> Ceilings:
        """F and W."""
        products, copies = ([rate for name, rate in self.rates.items() if name.startswith(kind)] for kind in ("matrix", "copy"))
        return Ceilings(max(products), max(copies))


def model_products(shape: Shape, work: Rows) -> tuple[tuple[int, int, int], ...]:
    """Linear layers of the model, on a quarter of the tokens of an iteration."""
    config, tokens = llama_config(shape), max((sum(work.prompt_lengths) + sum(work.lengths)) // 4, 1)
    return ((tokens, config.hidden_size, config.intermediate_size), (tokens, config.intermediate_size, config.hidden_size))


def run(job: Path, machine: Machine, rounds: Rounds) -> list[dict[str, float]]:
    """Iterations, with a look at the machine after each."""
    side, measured = ours(job, here()), []
    try:
        _ = side.manifest  # ready
        for _ in range(rounds.repeats + rounds.warm_up):
            measured.append(side.iteration())
            machine.look()
    finally:
        side.close()
    return measured[rounds.warm_up :]


def work_of(shape: Shape, config: dict[str, Any]) -> Iteration:
    """What an iteration of a resolved config computes."""
    policy, algorithm, value = sampled(shape), config["algorithm"], config["algorithm"]["estimator"] == "gae"
    language, scorer = policy.flops, without_head(policy.flops)
    scored = [language, scorer] + [scorer] * value + [language] * (algorithm["old_logprobs"] == "recompute")
    learners = {"policy": language} | ({"value": scorer} if value else {})
    trained = [
        model.training(frozen=bool(config[name]["lora"]), recomputed=config[name]["gradient_checkpointing"])
        for name, model in learners.items()
    ]
    return Iteration(policy, scored, trained, algorithm["epochs"])


def summary(least: dict[str, float], measured: list[dict[str, float]]) -> dict[str, Any]:
    """Least and measured seconds of each phase, and η with its spread."""
    seconds = {phase: asdict(spread([line[phase] for line in measured])) for phase in (*PHASES, "seconds")}
    eta = {phase: asdict(spread([least[phase] / line[phase] for line in measured])) for phase in PHASES}
    total = sum(least[phase] for phase in PHASES)
    eta["seconds"] = asdict(spread([total / line["seconds"] for line in measured]))
    return {"eta": eta, "seconds": seconds, "least": least | {"seconds": total}, "measured": measured}


def show(report: dict[str, Any], title: str) -> None:
    """The table a person reads."""
    table = Table(title=title)
    for column in ("", "least, s", "measured, s", "η"):
        table.add_column(column, justify="right" if column else "left")
    for phase in (*PHASES, "seconds"):
        name = "iteration" if phase == "seconds" else phase
        cells = (Spread(**report["seconds"][phase]).text(3), Spread(**report["eta"][phase]).text())
        table.add_row(name, f"{report['least'][phase]:.3f}", *cells)
    console = Console()
    console.print(table)
    found, least = report["ceilings"], report["least"]
    console.print(f"F {found['flops'] / 1e9:.0f} GFLOP/s, W {found['bytes_per_second'] / 1e9:.1f} GB/s (read and written)")
    console.print(f"generate at least: prefill {least['prefill']:.3f} s, decode {least['decode']:.3f} s")


if __name__ == "__main__":
    command(main, Options(rows=32, limit=128))
