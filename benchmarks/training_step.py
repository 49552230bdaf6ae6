"""Seconds of a PPO epoch of the policy, its optimizer steps alone: padded against packed rows, ZeRO stages, precisions, lengths.

The real engine and trainer (`workers.training`) train a random Llama on random rows with the PPO objective. Every variant does the same
optimizer work and has the same gradient; what differs is how rows lie in a forward:

- `plain`: rows as they come, each as wide as the longest prompt and the longest completion of the epoch together, the head at every slot:
  what TRL and DeepSpeed-Chat do (`layouts.py`); as many rows in a forward as make `--microbatch-tokens` slots;
- `padded`: `--rows-per-forward` rows as they come, closed up, each as wide as the longest sequence in its forward, the head at response
  tokens (as in all that follow);
- `sorted`: rows by length, cut where padding is least, at most `--microbatch-tokens` (our default, `policy.packing: false`);
- `packed`: several sequences in a row, as many tokens at most (`policy.packing: true`).

One engine a precision and stage; variants take turns, step by step. Half precision is ZeRO 1 at least. Trained tokens are response tokens.
MFU is the model's operations (three forwards, the head at response tokens, no padding) over what the machine's best matrix product makes in
that time, measured in the same run with as many threads as all ranks have together.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --ranks 2 --stages 0,1,2,3 --dtypes float32 --lengths ragged
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from ceilings import ceilings
from layouts import LAYOUTS, LayoutModule, Rectangle
from limits import Lengths, sequences_flops
from manifest import RESULTS, Spread, manifest, spread, write
from measuring import here, in_processes, now
from rich.console import Console
from rich.table import Table
from workload import DTYPES, Rows, Shape, experience, make_rows, sampled, save_models

BASES, WIDTH = ("plain", "padded"), 140
"""Layouts that the others are held against."""


@dataclass(frozen=True)
class Job:
    """What a rank must know. dtypes, stages, layouts, lengths: what is varied."""

    model: str
    shape: dict[str, int]
    rows: int
    minibatches: int
    limit: int
    microbatch_tokens: int
    rows_per_forward: int
    dtypes: tuple[str, ...]
    stages: tuple[int, ...]
    layouts: tuple[str, ...]
    lengths: tuple[str, ...]
    repeats: int
    warm_up: int
    threads: int
    rank: int = 0
    ranks: int = 1
    port: int = 0

    def variants(self) -> list[tuple[str, int, str, str]]:
        """Precision, stage, lengths, layout. Stages but the lowest are tried on one layout and one kind of lengths: they change neither.

        In half precision the package makes stage 1 of stage 0 (config.deepspeed).
        """
        found: dict[tuple[str, int, str, str], None] = {}
        for dtype in self.dtypes:
            stages = sorted({stage if dtype == "float32" else max(stage, 1) for stage in self.stages})
            found |= dict.fromkeys((dtype, stages[0], kind, layout) for kind in self.lengths for layout in self.layouts)
            found |= dict.fromkeys((dtype, stage, self.lengths[0], self.layouts[-1]) for stage in stages)
        return list(found)


def main(
    dtypes: Annotated[str, typer.Option(help="precisions, by comma")] = "float32,bfloat16",
    stages: Annotated[str, typer.Option(help="ZeRO stages, by comma")] = "0,1,2,3",
    layouts: Annotated[str, typer.Option(help="layouts, by comma; stages are compared on the last")] = ",".join(LAYOUTS),
    lengths: Annotated[str, typer.Option(help="ragged, full, by comma; stages are compared on the first")] = "ragged,full",
    rows: Annotated[int, typer.Option(help="sequences")] = 32,
    minibatches: Annotated[int, typer.Option(help="optimizer steps over them")] = 4,
    limit: Annotated[int, typer.Option(help="longest completion, in tokens")] = 128,
    microbatch_tokens: Annotated[int, typer.Option(help="most tokens in a forward, and of plain rows most slots")] = 4096,
    rows_per_forward: Annotated[int, typer.Option(help="rows of a forward, padded")] = 8,
    repeats: Annotated[int, typer.Option(help="timed epochs of each variant")] = 5,
    warm_up: Annotated[int, typer.Option(help="epochs before those")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads of all ranks together")] = 2,
    ranks: Annotated[int, typer.Option(help="processes that the engines are sharded over")] = 1,
    hidden: Annotated[int, typer.Option(help="hidden size")] = 512,
    layers: Annotated[int, typer.Option(help="layers")] = 8,
    vocabulary: Annotated[int, typer.Option(help="words of the tokenizer")] = 32000,
    results: Annotated[Path, typer.Option(help="folder of the JSON")] = RESULTS,
    job: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measures the variants in turns and prints a table; the figures go to benchmarks/results/ as JSON."""
    if job:
        print(json.dumps(measure(Job(**json.loads(job)))))
        return
    from rlhf_dist.engines.process import free_port

    shape, device = Shape(hidden, layers, vocabulary), here()
    with tempfile.TemporaryDirectory() as temporary:
        work = Job(
            model=save_models(Path(temporary), shape, scorer=False, tokenizer=False)[0],
            shape=asdict(shape),
            rows=rows,
            minibatches=minibatches,
            limit=limit,
            microbatch_tokens=microbatch_tokens,
            rows_per_forward=rows_per_forward,
            dtypes=tuple(dtypes.split(",")),
            stages=tuple(int(stage) for stage in stages.split(",")),
            layouts=tuple(layouts.split(",")),
            lengths=tuple(lengths.split(",")),
            repeats=repeats,
            warm_up=warm_up,
            threads=max(1, threads // ranks),
            ranks=ranks,
            port=free_port(),
        )
        answer = in_processes(__file__, [asdict(replace(work, rank=rank)) for rank in range(ranks)], work.threads)
    report = summary(work, answer)
    workload = asdict(work) | {"model": f"random Llama, hidden {hidden}, layers {layers}", "port": 0}
    show(report, f"{rows} rows of up to {limit} tokens in {minibatches} optimizer steps, {ranks} rank(s), {threads} threads, {device}")
    facts = manifest("ours", workload, threads, device, warm_up=warm_up, repeats=repeats)
    name = f"training_step_llama{hidden}x{layers}_{device}_r{rows}x{limit}_steps{minibatches}_ranks{ranks}_t{threads}"
    write(name, report | {"manifest": asdict(facts)}, results)


def measure(job: Job) -> dict[str, Any]:
    """Runs all variants in turns, as one rank; seconds by variant, and the ceiling of each precision (rank 0)."""
    import torch

    from rlhf_dist.engines.process import start_process_group, stop_process_group

    torch.set_num_threads(job.threads)
    place = start_process_group(job.rank, job.ranks, job.rank, "127.0.0.1", job.port)
    batches = {kind: experience(make(job, kind), job.shape["vocabulary"]) for kind in job.lengths}
    with tempfile.TemporaryDirectory() as folder:
        engines = {pair: _engine(job, *pair, place, Path(folder)) for pair in {variant[:2]: None for variant in job.variants()}}
    seconds: dict[str, list[float]] = {_name(variant): [] for variant in job.variants()}
    for repeat in range(job.repeats + job.warm_up):
        for variant in job.variants():
            dtype, stage, kind, layout = variant
            engine = engines[dtype, stage]
            engine.module.lay(layout, rectangle(job, kind))
            took = sum(_step(batches[kind], engine, job, variant, number, place.device) for number in range(job.minibatches))
            if repeat >= job.warm_up:
                seconds[_name(variant)].append(took)
    peaks = {}
    if job.rank == 0:  # the others wait, so that all threads of the machine are free
        torch.set_num_threads(job.threads * job.ranks)
        kind = place.device.split(":")[0]
        peaks = {dtype: ceilings(getattr(torch, dtype), kind)[0].flops for dtype in job.dtypes}
    torch.distributed.barrier()
    stop_process_group()
    return {"seconds": seconds, "flops_per_second": peaks, "device": place.device}


def make(job: Job, kind: str) -> Rows:
    """The rows of `ragged` or of `full` length."""
    return make_rows(job.rows, job.limit, ragged=kind == "ragged", vocabulary=job.shape["vocabulary"])


def rectangle(job: Job, kind: str) -> Rectangle:
    """What every plain row is padded to."""
    rows = make(job, kind)
    return Rectangle(max(rows.prompt_lengths), max(rows.lengths))


def microbatches(job: Job, kind: str, layout: str, number: int) -> tuple[tuple[int, ...], ...]:
    """This rank's rows of each forward of a minibatch. Of plain and padded ones all ranks get as many rows, as they come."""
    from rlhf_dist.data.schedule import assign

    rows = make(job, kind)
    lengths = [prompt + tokens for prompt, tokens in zip(rows.prompt_lengths, rows.lengths, strict=True)]
    chosen = range(number, len(lengths), job.minibatches)
    if layout in ("sorted", "packed"):
        return assign(chosen, lengths, job.ranks, job.microbatch_tokens, packed=layout == "packed")[job.rank]
    together = max(job.microbatch_tokens // rectangle(job, kind).slots, 1) if layout == "plain" else job.rows_per_forward
    mine, most = chosen[job.rank :: job.ranks], -(-len(chosen) // job.ranks)
    return tuple(tuple(mine[start : start + together]) for start in range(0, most, together))


def _engine(job: Job, dtype: str, stage: int, place: Any, folder: Path) -> Any:
    from rlhf_dist.config.engines import PolicySection
    from rlhf_dist.engines.deepspeed import Training
    from rlhf_dist.workers.training import build_engine, load_policy

    file = folder / f"zero{stage}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}), encoding="utf-8")
    section = PolicySection.model_validate({"model": job.model, "dtype": DTYPES[dtype], "deepspeed": str(file)})
    # Packing is checked when the module is made; each step then says which layout it wants.
    module = LayoutModule(load_policy(section, 0), packing=True)
    return build_engine(module, section, place, Training(section.optim, (job.repeats + job.warm_up) * job.minibatches))


def _step(batch: Any, engine: Any, job: Job, variant: tuple[str, int, str, str], number: int, device: str) -> float:
    """The optimizer step of a minibatch; its seconds."""
    from rlhf_dist.algos.objectives import PolicyObjective
    from rlhf_dist.config.algorithm import AlgorithmSection
    from rlhf_dist.contracts.moments import Moments
    from rlhf_dist.contracts.roles import UpdateRequest
    from rlhf_dist.workers.training import Trainer

    trainer = Trainer(engine, PolicyObjective(AlgorithmSection()), whitens=False)
    trainer.load([batch], Moments())
    tokens = float(batch.valid_tokens_B[number :: job.minibatches].sum())
    request = UpdateRequest(microbatches(job, *variant[2:], number), tokens)
    began = now(device)
    trainer.update(request)
    return now(device) - began


def summary(job: Job, answer: dict[str, Any]) -> dict[str, Any]:
    """Of each variant seconds with their spread, trained tokens a second, MFU, and how many times as fast as plain and as padded rows."""
    model = sampled(Shape(**job.shape)).flops.training(frozen=False, recomputed=False)
    devices = job.ranks if answer["device"].startswith("cuda") else 1  # on CPUs the ceiling is that of all threads together
    found: dict[str, Any] = {}
    for variant in job.variants():
        dtype, stage, kind, layout = variant
        rows, seconds = make(job, kind), answer["seconds"][_name(variant)]
        bases = {base: answer["seconds"].get(_name((dtype, stage, kind, base))) for base in BASES}
        took = spread(seconds)
        rate = sequences_flops(model, Lengths(rows.prompt_lengths, rows.lengths)) / took.median
        gains = {base: asdict(spread([a / b for a, b in zip(slow, seconds, strict=True)])) for base, slow in bases.items() if slow}
        found[_name(variant)] = {
            "seconds": asdict(took),
            "trained_tokens_per_second": sum(rows.lengths) / took.median,
            "mfu": rate / (answer["flops_per_second"][dtype] * devices),
            "faster_than": gains,
            "rows_per_forward": [len(rows) for number in range(job.minibatches) for rows in microbatches(job, kind, layout, number)],
        }
    return {"variants": found, "flops_per_second": answer["flops_per_second"], "measured": answer["seconds"]}


def show(report: dict[str, Any], title: str) -> None:
    """The table a person reads."""
    table = Table(title=title)
    for column in ("", "seconds", "trained tokens/s", "MFU", *(f"{base} / this" for base in BASES)):
        table.add_column(column, justify="right" if column else "left")
    for name, found in report["variants"].items():
        gains = (Spread(**found["faster_than"][base]).text() if base in found["faster_than"] else "" for base in BASES)
        cells = (Spread(**found["seconds"]).text(3), f"{found['trained_tokens_per_second']:.0f}", f"{found['mfu']:.1%}")
        table.add_row(name, *cells, *gains)
    console = Console(width=WIDTH)
    console.print(table)
    best = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in report["flops_per_second"].items())
    console.print(f"best matrix product: {best}")


def _name(variant: tuple[str, int, str, str]) -> str:
    dtype, stage, kind, layout = variant
    return f"{dtype}, ZeRO {stage}, {kind}, {layout}"


if __name__ == "__main__":
    typer.run(main)
