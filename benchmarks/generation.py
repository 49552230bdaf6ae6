"""Generation side by side: our decode loop, `generate` and continuous batching of transformers, and vLLM, on the same rows in one run.

Every side is a process of its own with the same model, prompts, forced lengths, precision and number of threads; they take turns, one round
at a time, and the table shows medians. vLLM has an environment of its own (`bash launch/vllm_env.sh`), named by `--vllm`, and runs twice:
left to itself, and as `rlhf_dist` uses it (a seed a row, log-probs). The sides that report log-probs are held against a plain forward.
Each side's manifest says how it does it (`settings`): slots, pages, attention, and vLLM whether it runs eager or compiled (`--compiled`;
through our engine it is compiled on GPUs alone).

The model is a random Llama of 41M parameters unless `--model` names a folder; 32 prompts of up to 48 tokens, completions of up to 128,
log-normal with a third of the limit on average, or all of full length.

    python benchmarks/generation.py --vllm .venv-vllm/bin/python
    python benchmarks/generation.py --dtype bfloat16 --full --sides native,generate
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from manifest import RESULTS, Spread, check_alike, spread, write
from measuring import here
from rich.console import Console
from rich.table import Table
from turns import Side, take_turns
from workload import Rows, Shape, make_rows, save_models

PEER = Path(__file__).parent / "peers" / "generating.py"
WIDTH = 130
OURS, THEIRS = ("native", "generate", "continuous"), ("vllm", "vllm_engine")
LABELS = {"generate": "transformers generate", "continuous": "continuous batching", "vllm": "vLLM", "vllm_engine": "vLLM, our engine"}


def main(
    vllm: Annotated[Path | None, typer.Option(help="Python of the environment that has vLLM; without it vLLM is left out")] = None,
    sides: Annotated[str, typer.Option(help="some of native,generate,continuous,vllm,vllm_engine; native is always there")] = "",
    model: Annotated[str, typer.Option(help="model folder; empty: a random Llama of --hidden and --layers")] = "",
    hidden: Annotated[int, typer.Option(help="hidden size of the random model")] = 512,
    layers: Annotated[int, typer.Option(help="layers of the random model")] = 8,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    ragged: Annotated[bool, typer.Option("--ragged/--full", help="log-normal lengths, or all of full length")] = True,
    rows: Annotated[int, typer.Option(help="completions of a round")] = 32,
    limit: Annotated[int, typer.Option(help="longest completion, in tokens")] = 128,
    compiled: Annotated[bool, typer.Option(help="let vLLM compile the model")] = False,
    repeats: Annotated[int, typer.Option(help="timed rounds of each")] = 5,
    warm_up: Annotated[int, typer.Option(help="rounds before those")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
    results: Annotated[Path, typer.Option(help="folder of the JSON")] = RESULTS,
) -> None:
    """Runs all sides in turns and prints a table; the figures go to benchmarks/results/ as JSON."""
    device, shape = here(), Shape(hidden, layers)
    names = chosen(sides, vllm)
    with tempfile.TemporaryDirectory() as temporary:
        folder = model or save_models(Path(temporary), shape, scorer=False)[0]
        work = make_rows(rows, limit, ragged=ragged, vocabulary=vocabulary(folder))
        facts = {
            "model": Path(model).name or f"random Llama, hidden {hidden}, layers {layers}",
            "dtype": dtype,
            "ragged": ragged,
            "limit": limit,
        }
        job = Path(temporary) / "job.json"
        run = {"threads": threads, "device": device, "compile": compiled, "warm_up": warm_up, "repeats": repeats}
        job.write_text(json.dumps(run | rows_of(folder, facts, work)), encoding="utf-8")
        pythons = {name: vllm if name in THEIRS else sys.executable for name in names}
        started = {name: Side([*environment(threads), str(python), str(PEER), str(job), name], device) for name, python in pythons.items()}
        for side in started.values():
            check_alike(started["native"].manifest, side.manifest)
        measured = take_turns(started, repeats, warm_up)
    report = summary(measured, sum(work.lengths)) | {name: asdict(side.manifest) for name, side in started.items()}
    show(report, names)
    kind = Path(model).name or f"llama{hidden}x{layers}"
    size = f"{'ragged' if ragged else 'full'}_{dtype}_r{rows}_t{threads}{'_compiled' if compiled else ''}"
    write(f"generation_{kind}_{device}_{size}", report, results)


def chosen(sides: str, vllm: Path | None) -> list[str]:
    """The sides that will run."""
    possible = OURS + (THEIRS if vllm else ())
    wanted = [name for name in sides.split(",") if name] or list(possible)
    if unknown := [name for name in wanted if name not in possible]:
        raise typer.BadParameter(f"{unknown[0]} is none of {', '.join(OURS + THEIRS)}, or needs --vllm")
    return ["native", *(name for name in wanted if name != "native")]


def environment(threads: int) -> list[str]:
    """Starts a program with its number of threads, which vLLM takes from here alone. It binds them to no cores, as the others do not."""
    return ["env", f"OMP_NUM_THREADS={threads}", "VLLM_CPU_OMP_THREADS_BIND=nobind", "VLLM_LOGGING_LEVEL=ERROR"]


def vocabulary(folder: str) -> int:
    """Tokens of a model."""
    size: int = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return size


def rows_of(model: str, facts: dict[str, Any], work: Rows) -> dict[str, Any]:
    """Model, rows, and what the manifests say of them."""
    return {"policy": model, "dtype": facts["dtype"], "prompts": work.prompts, "lengths": work.lengths, "workload": facts | work.facts()}


def summary(measured: dict[str, list[dict[str, float]]], tokens: int) -> dict[str, Any]:
    """Medians with their spread, tokens per second, native's speed over each side's, round by round and at the median."""
    seconds = {name: [line["seconds"] for line in lines] for name, lines in measured.items()}
    native = seconds["native"]
    return {
        "measured": measured,
        "seconds": {name: asdict(spread(values)) for name, values in seconds.items()},
        "tokens_per_second": {name: tokens / spread(values).median for name, values in seconds.items()},
        "native_is_faster": {
            name: asdict(spread([other / own for own, other in zip(native, values, strict=True)])) for name, values in seconds.items()
        },
        "logprob_gap": {name: {"mean": lines[0]["gap_mean"], "largest": lines[0]["gap_largest"]} for name, lines in measured.items()
                        if "gap_mean" in lines[0]},
    }  # fmt: skip


def show(report: dict[str, Any], names: list[str]) -> None:
    """The table a person reads."""
    facts = report["native"]["workload"]
    size = f"{facts['rows']} completions, {facts['tokens']} tokens, {facts['dtype']}, {report['native']['threads']} threads"
    table = Table(title=f"{facts['model']}, {size}")
    for column in ("", "seconds (lowest to highest)", "tokens/s", "native is faster by", "log-prob gap, largest"):
        table.add_column(column, justify="right" if column else "left")
    for name in names:
        gap = report["logprob_gap"].get(name)
        ratio = Spread(**report["native_is_faster"][name]).text() if name != "native" else ""
        seconds = Spread(**report["seconds"][name]).text()
        mode = report[name]["settings"].get("execution", "")
        table.add_row(
            LABELS.get(name, name) + (f", {mode}" if mode else ""),
            seconds,
            f"{report['tokens_per_second'][name]:.0f}",
            ratio,
            f"{gap['largest']:.1e}" if gap else "",
        )
    Console(width=WIDTH).print(table)


if __name__ == "__main__":
    typer.run(main)
