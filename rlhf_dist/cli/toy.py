"""`rlhf-dist toy`: writes the built-in task: stories, preferences, prompts, a tokenizer, and a tiny model that knows nothing yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def toy(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write: corpus, pairs, prompts, tokenizer, model")],
    seed: Annotated[int, typer.Option(min=0, help="seed of corpus and model")] = 0,
) -> None:
    """Writes a small English corpus, preference pairs, prompts, a tokenizer and an untrained causal LM: all that the pipeline needs."""
    from rlhf_dist.models.quiet import quiet_libraries

    quiet_libraries()
    from rlhf_dist.data.toy import ToyTask, write_toy
    from rlhf_dist.models.loading import load_tokenizer_folder
    from rlhf_dist.models.tiny import TinyShape, save_untrained

    console = Console()
    task: ToyTask = write_toy(output, seed=seed)
    parameters = save_untrained(load_tokenizer_folder(str(task.tokenizer)), TinyShape(), seed, output / "model")
    story, pair = (json.loads(path.read_text(encoding="utf-8").splitlines()[0]) for path in (task.corpus, task.pairs))
    lines = (
        f"a story      {story['prompt']}|{story['completion']}",
        f"a preference {pair['prompt']}|{pair['chosen']}\n   rather than{pair['rejected']}",
        f"an untrained model of {parameters} parameters; all in {output}",
    )
    console.print("\n".join(lines), markup=False, soft_wrap=True, highlight=False)
