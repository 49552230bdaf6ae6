"""Peak memory of loading, scoring, and an optimizer step: the head in blocks against whole logits, activation checkpointing, adapters.

Each measurement is a process of its own with the real engine, so that a peak is that of one variant. Three questions, each answered against
its own first line:

- `head`: models of few layers and a small hidden size, by vocabulary; log-probs from logits that stand whole in memory (`plain`), or
  streamed over blocks of the vocabulary (`streamed`, what the package does where logits would be large);
- `checkpointing`: all activations kept, or recomputed in the backward pass;
- `training`: all weights, LoRA, QLoRA (linear layers held in 4 bits).

A phase's figure is what its peak adds to what was held when it began: weights are not in it, nor optimiser state (the second step is looked
at); gradients are, since they come and go with a step. `process` is the peak of the whole life of the process. On a CPU both are resident
memory (Linux), on a GPU what torch allocated.

    python benchmarks/memory.py
    python benchmarks/memory.py --questions head --vocabularies 32000,128000 --rows 32
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from manifest import RESULTS, Spread, manifest, spread, write
from measuring import GIVES_BACK, held, here, in_a_process, peak
from rich.console import Console
from rich.table import Table
from workload import Shape, experience, make_rows, save_models

QUESTIONS = ("head", "checkpointing", "training")
PHASES = ("load", "score", "step", "process")
WHOLE, WIDTH, STEPS = 2**62, 130, 2


@dataclass(frozen=True)
class Variant:
    """One measurement. streamed: None leaves it to the package. method: full, LoRA or QLoRA."""

    name: str
    shape: Shape
    streamed: bool | None = None
    checkpointing: bool = False
    method: str = "full"


@dataclass(frozen=True)
class Load:
    """The rows: how many, and how long (prompts of up to 48 tokens, completions all of this length)."""

    rows: int
    limit: int
    dtype: str
    threads: int


def main(
    questions: Annotated[str, typer.Option(help="head, checkpointing, training, by comma")] = ",".join(QUESTIONS),
    vocabularies: Annotated[str, typer.Option(help="of the head's question, by comma")] = "32000,128000",
    rows: Annotated[int, typer.Option(help="rows of a forward")] = 8,
    limit: Annotated[int, typer.Option(help="tokens of a completion")] = 128,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    hidden: Annotated[int, typer.Option(help="hidden size, but for the head's question")] = 512,
    layers: Annotated[int, typer.Option(help="layers, but for the head's question")] = 8,
    repeats: Annotated[int, typer.Option(help="processes of each variant")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
    results: Annotated[Path, typer.Option(help="folder of the JSON")] = RESULTS,
    job: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measures the variants in turn and prints a table; the figures go to benchmarks/results/ as JSON."""
    if job:
        given = json.loads(job)
        shape = Shape(**given["variant"].pop("shape"))
        print(json.dumps(measure(Variant(shape=shape, **given["variant"]), Load(**given["load"]), given["model"])))
        return
    load, sizes = Load(rows, limit, dtype, threads), [int(size) for size in vocabularies.split(",")]
    chosen = [variant for question in questions.split(",") for variant in variants(question, Shape(hidden, layers), sizes)]
    found: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in chosen}
    with tempfile.TemporaryDirectory() as temporary:
        models = {
            shape: save_models(Path(temporary) / str(hash(shape)), shape, scorer=False, tokenizer=False)[0]
            for shape in {v.shape for v in chosen}
        }
        for _ in range(repeats):
            for variant in chosen:
                given = {"variant": asdict(variant), "load": asdict(load), "model": models[variant.shape]}
                found[variant.name].append(in_a_process(__file__, given, threads, GIVES_BACK))
    device = here()
    workload = asdict(load) | {"variants": [asdict(variant) for variant in chosen]}
    report = {"mib": {name: _spreads(lines) for name, lines in found.items()}, "measured": found}
    show(report, f"MiB, {rows} rows with completions of {limit} tokens, {dtype}, {device}")
    facts = manifest("ours", workload, threads, device, warm_up=STEPS - 1, repeats=repeats)
    write(f"memory_llama{hidden}x{layers}_{device}_{dtype}_r{rows}x{limit}_t{threads}", report | {"manifest": asdict(facts)}, results)


def variants(question: str, shape: Shape, vocabularies: list[int]) -> Iterator[Variant]:
    """What a question compares.

    Raises:
        BadParameter: no such question.
    """
    if question == "head":
        for size in vocabularies:
            small = Shape(128, 2, size)
            for streamed in (False, True):
                yield Variant(f"head, vocabulary {size}, {'streamed' if streamed else 'plain'}", small, streamed)
    elif question == "checkpointing":
        for on in (False, True):
            yield Variant(f"activations {'recomputed' if on else 'kept'}", shape, checkpointing=on)
    elif question == "training":
        for method in ("full", "LoRA", "QLoRA"):
            yield Variant(f"{method} training", shape, method=method)
    else:
        raise typer.BadParameter(f"no question {question!r}: there are {', '.join(QUESTIONS)}")


def measure(variant: Variant, load: Load, model: str) -> dict[str, float]:
    """MiB that each phase's peak adds to what was held before it, in this process; and the peak of the process."""
    import torch

    from rlhf_dist.algos.objectives import PolicyObjective
    from rlhf_dist.config.algorithm import AlgorithmSection
    from rlhf_dist.engines.process import free_port, start_process_group, stop_process_group

    torch.set_num_threads(load.threads)
    place = start_process_group(0, 1, 0, "127.0.0.1", free_port())
    rows = make_rows(load.rows, load.limit, ragged=False, vocabulary=variant.shape.vocabulary)
    meter, batch = Meter(place.device), experience(rows, variant.shape.vocabulary)
    engine: Any = meter.phase("load", lambda: _engine(variant, load, model, place))
    engine.forward([batch])
    meter.phase("score", lambda: engine.forward([batch]))
    objective, tokens = PolicyObjective(AlgorithmSection()), float(batch.valid_tokens_B.sum())

    def step() -> None:
        engine.forward_backward([batch], objective, tokens)
        engine.optimizer_step()

    for _ in range(STEPS):  # the last one counts
        meter.phase("step", step)
    stop_process_group()
    return meter.found | {"process": meter.most}


class Meter:
    """Peaks of phases that follow each other."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.found: dict[str, float] = {}
        self.most = 0.0

    def phase(self, name: str, run: Any) -> Any:
        """Runs it; what it returns."""
        self.most = max(self.most, peak(self._device, reset=True))
        before = held(self._device)
        answer = run()
        highest = peak(self._device)
        self.most = max(self.most, highest)
        self.found[name] = highest - before
        return answer


def _engine(variant: Variant, load: Load, model: str, place: Any) -> Any:
    from rlhf_dist.config.engines import PolicySection
    from rlhf_dist.workers.training import build_policy

    values: dict[str, Any] = {"model": model, "dtype": load.dtype, "gradient_checkpointing": variant.checkpointing}
    if variant.method != "full":
        values |= {"lora": {"r": 16}, "quantize": "nf4" if variant.method == "QLoRA" else "none"}
    engine = build_policy(PolicySection.model_validate(values), 0, place, STEPS)
    if variant.streamed is not None:
        engine.module.options = replace(engine.module.options, logits_bytes=0 if variant.streamed else WHOLE)
    return engine


def _spreads(lines: list[dict[str, float]]) -> dict[str, Any]:
    return {phase: asdict(spread([line[phase] for line in lines])) for phase in PHASES}


def show(report: dict[str, Any], title: str) -> None:
    """The table a person reads."""
    table = Table(title=title)
    for column in ("", *PHASES):
        table.add_column(column, justify="right" if column else "left")
    for name, found in report["mib"].items():
        table.add_row(name, *(Spread(**found[phase]).text(0) for phase in PHASES))
    Console(width=WIDTH).print(table)


if __name__ == "__main__":
    typer.run(main)
