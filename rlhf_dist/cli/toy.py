"""`rlhf-dist toy`: writes the built-in task and trains a tiny language model on it, from nothing, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress


def toy(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write: corpus, prompts, tokenizer, model")],
    seed: Annotated[int, typer.Option(min=0, help="seed of corpus and model")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps of the language model")] = 400,
) -> None:
    """Writes a small English corpus with prompts and a tokenizer, and trains a tiny causal LM on it from scratch (about a minute)."""
    from rlhf_dist.models.quiet import quiet_libraries

    quiet_libraries()
    import torch

    from rlhf_dist.data.toy import ToyTask, write_toy
    from rlhf_dist.engines.process import free_port, start_process_group, stop_process_group
    from rlhf_dist.models.loading import load_tokenizer_folder
    from rlhf_dist.training.language_model import TinyModel, save_model, train_language_model

    torch.set_num_threads(1)  # so small a model gains nothing from a second thread, and loses much where cores are busy
    console = Console()
    task: ToyTask = write_toy(output, seed=seed)
    tokenizer = load_tokenizer_folder(str(task.tokenizer))
    rows = [json.loads(line) for line in task.corpus.read_text(encoding="utf-8").splitlines()]
    sequences = [[*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id] for row in rows]
    console.print(
        f"corpus of {len(rows)} stories, for example:\n  {rows[0]['prompt']}|{rows[0]['completion']}", markup=False, soft_wrap=True
    )
    rank = start_process_group(0, 1, 0, "127.0.0.1", free_port())
    try:
        with Progress(console=console) as bar:
            bar_task = bar.add_task("language model", total=steps)
            model, loss = train_language_model(
                sequences, tokenizer, TinyModel(steps=steps), seed, lambda step, *_: bar.update(bar_task, completed=step), rank
            )
        save_model(model, tokenizer, output / "model")
    finally:
        stop_process_group()
    console.print(
        f"language model: {model.num_parameters()} parameters, loss {loss:.3f} nats a token; saved in {output / 'model'}", soft_wrap=True
    )
