"""Peak memory and tokens per second of full, LoRA and QLoRA (NF4) fine-tuning of one model, by the engine that every stage trains with.

Each measurement is a process of its own, so that a peak is that of one variant; the three take turns, and the table shows medians with the
lowest and highest of the repeats, and ratios to full fine-tuning. One untimed step goes before those that are timed. Every row has as many
tokens as the others, and the loss is on all of them but the first.

Memory is looked at twice. `training` is the peak from the first step on: weights, gradients, optimiser, activations. `process` is the peak
of the whole life of the process, loading included, which reads the weights in `--dtype` before some of them are held in 4 bits; on a CPU
both are resident memory with the libraries (`imports` says how much that is before a model is loaded), on a GPU what torch allocated.

    python benchmarks/finetuning.py                              # random weights, 98M parameters, on a CPU
    python benchmarks/finetuning.py --model path/to/model --device cuda --rows 16 --length 512
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from manifest import RESULTS, Spread, manifest, spread, write
from measuring import in_a_process, now, peak
from rich.console import Console
from rich.table import Table

VARIANTS = ("full", "LoRA", "QLoRA")
WIDTH = 130


@dataclass(frozen=True)
class Job:
    """What every variant does. rank: of the adapters."""

    model: str
    dtype: str
    rows: int
    length: int
    steps: int
    rank: int
    threads: int
    device: str
    checkpointing: bool


@dataclass(frozen=True)
class Measurement:
    """One process. Memory in MiB; losses of all steps, the untimed one first."""

    tokens_per_second: float
    training_mib: float
    process_mib: float
    imports_mib: float
    parameters: int
    trained_parameters: int
    losses: list[float]


def main(
    model: Annotated[str, typer.Option(help="model folder; empty: a random Llama of --hidden and --layers")] = "",
    hidden: Annotated[int, typer.Option(help="hidden size of the random model, a multiple of 64")] = 768,
    layers: Annotated[int, typer.Option(help="layers of the random model")] = 12,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16 (GPU)")] = "bf16",
    rows: Annotated[int, typer.Option(help="rows of a step")] = 4,
    length: Annotated[int, typer.Option(help="tokens of a row")] = 64,
    steps: Annotated[int, typer.Option(help="timed steps")] = 2,
    rank: Annotated[int, typer.Option(help="rank of the adapters")] = 16,
    repeats: Annotated[int, typer.Option(help="processes of each variant")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    checkpointing: Annotated[bool, typer.Option(help="recompute activations in the backward pass")] = False,
    results: Annotated[Path, typer.Option(help="folder of the JSON")] = RESULTS,
    job: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measures the variants in turn and prints a table; the figures go to benchmarks/results/ as JSON."""
    if job:
        given = json.loads(job)
        print(json.dumps(asdict(measure(given.pop("variant"), Job(**given)))))
        return
    from rlhf_dist.models.quiet import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        work = Job(model or random_model(Path(scratch), hidden, layers), dtype, rows, length, steps, rank, threads, device, checkpointing)
        found: dict[str, list[Measurement]] = {variant: [] for variant in VARIANTS}
        for _ in range(repeats):
            for variant in VARIANTS:
                found[variant].append(Measurement(**in_a_process(__file__, {"variant": variant} | asdict(work), threads)))
    name = Path(model).name if model else f"llama{hidden}x{layers}"
    workload = asdict(work) | {"model": model or f"random Llama, hidden {hidden}, layers {layers}"}
    report = summary(found) | {"job": workload, "manifest": asdict(manifest("ours", workload, threads, device, warm_up=1, repeats=repeats))}
    show(report, name)
    write(f"finetuning_{name}_{device}_{dtype}_b{rows}x{length}_t{threads}", report, results)


def random_model(folder: Path, hidden: int, layers: int) -> str:
    """Saves a random Llama with a vocabulary of 8192."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=-(-hidden * 8 // 3 // 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return str(folder)


def measure(variant: str, job: Job) -> Measurement:
    """Trains in this process."""
    import torch

    from rlhf_dist.algos.likelihood import nll_objective
    from rlhf_dist.config.engines import LoraSection, PolicySection
    from rlhf_dist.engines.deepspeed import Training
    from rlhf_dist.engines.process import free_port, start_process_group, stop_process_group
    from rlhf_dist.models.loading import load_causal_lm
    from rlhf_dist.models.lora import add_adapter
    from rlhf_dist.models.policy import PolicyModule
    from rlhf_dist.workers.training import build_engine, parameter_counts, prepare_checkpointing

    torch.set_num_threads(job.threads)
    place = start_process_group(0, 1, 0, "127.0.0.1", free_port())
    if place.device.split(":")[0] != job.device:
        raise SystemExit(f"asked for {job.device}, this machine has {place.device}")
    imports = peak(job.device)
    lora = None if variant == "full" else LoraSection(r=job.rank)
    section = PolicySection.model_validate(
        {
            "model": job.model,
            "dtype": job.dtype,
            "quantize": "nf4" if variant == "QLoRA" else "none",
            "lora": lora,
            "gradient_checkpointing": job.checkpointing,
            "optim": {"lr": 1e-4},
        }
    )
    model: Any = load_causal_lm(section, job.model)
    vocabulary = model.config.get_text_config().vocab_size
    model = model if lora is None else add_adapter(model, lora, seed=0)
    engine = build_engine(PolicyModule(prepare_checkpointing(model, section)), section, place, Training(section.optim, job.steps + 1))
    batch, tokens = rows_of(job, vocabulary)
    loaded = peak(job.device, reset=True)
    losses, seconds = [], 0.0
    for step in range(job.steps + 1):
        began = now(job.device)
        tally = engine.forward_backward([batch], nll_objective, float(tokens))
        engine.optimizer_step()
        seconds += (now(job.device) - began) if step else 0.0
        losses.append(tally.means()["loss"])
    training = peak(job.device)
    stop_process_group()
    counts = parameter_counts(engine.module)
    return Measurement(tokens * job.steps / seconds, training, max(loaded, training), imports, **counts, losses=losses)


def rows_of(job: Job, vocabulary: int) -> tuple[Any, int]:
    """Random rows as the SFT stage collates them, and how many tokens the loss is on."""
    import numpy as np

    from rlhf_dist.data.token_rows import TokenRow, collate_demonstrations

    draw = np.random.default_rng(0)
    trained = np.arange(job.length) > 0
    rows = [TokenRow(draw.integers(3, vocabulary, job.length, dtype=np.int32), trained) for _ in range(job.rows)]
    return collate_demonstrations(rows), job.rows * (job.length - 1)


def summary(found: dict[str, list[Measurement]]) -> dict[str, Any]:
    """Medians with their spread, ratios of the medians to full fine-tuning, and every measurement."""
    names = ("tokens_per_second", "training_mib", "process_mib", "imports_mib")
    spreads = {variant: {name: spread([getattr(m, name) for m in all_]) for name in names} for variant, all_ in found.items()}
    medians = {variant: {name: each.median for name, each in found_.items()} for variant, found_ in spreads.items()}
    ratios = {variant: {name: medians[variant][name] / medians["full"][name] for name in names[:3]} for variant in found}
    runs = {variant: [asdict(m) for m in all_] for variant, all_ in found.items()}
    kept = {variant: {name: asdict(each) for name, each in found_.items()} for variant, found_ in spreads.items()}
    return {"median": medians, "spread": kept, "ratio_to_full": ratios, "runs": runs}


def show(report: dict[str, Any], name: str) -> None:
    """The table a person reads."""
    job = report["job"]
    counted = report["runs"]["full"][0]["parameters"] / 1e6
    table = Table(title=f"{name}, {counted:.0f}M parameters, {job['dtype']}, {job['rows']} rows of {job['length']} tokens, {job['device']}")
    for column in ("", "trained", "training MiB", "to full", "process MiB", "to full", "tokens/s", "to full"):
        table.add_column(column, justify="right" if column else "left")
    for variant, spreads in report["spread"].items():
        ratio, first = report["ratio_to_full"][variant], report["runs"][variant][0]
        cells = [f"{first['trained_parameters'] / 1e6:.2f}M"]
        for key, digits in (("training_mib", 0), ("process_mib", 0), ("tokens_per_second", 1)):
            cells += [Spread(**spreads[key]).text(digits), f"{ratio[key]:.2f}×"]
        table.add_row(variant, *cells)
    console = Console(width=WIDTH)
    console.print(table)
    console.print(f"of which before a model is loaded: {report['median']['full']['imports_mib']:.0f} MiB")


if __name__ == "__main__":
    typer.run(main)
