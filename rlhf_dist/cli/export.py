"""`rlhf-dist export`: an adapter merged into its base model, or the files of a checkpoint put together, as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_dist.config.errors import UserError


def export(
    source: Annotated[
        str, typer.Argument(help="a PEFT adapter folder, an engine's folder in a checkpoint, or the folder of a DeepSpeed ZeRO checkpoint")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write; new or empty")],
    base: Annotated[str, typer.Option(help="base model, where the source names none or one that is no longer there")] = "",
) -> None:
    """Writes whole weights (safetensors), configuration and tokenizer; transformers and vLLM load the folder with no help."""
    from rlhf_dist.models.quiet import quiet_libraries

    quiet_libraries()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("the folder to write is not empty", where=str(out), fix="name a new folder with --out")
    what, model, weights, tokenizer = _whole(source, base or None)
    from rlhf_dist.models.saving import save_model

    save_model(model, weights, out)
    tokenizer.save_pretrained(out)
    print(f"{what}: {len(weights)} weights, {sum(w.numel() for w in weights.values()):,} numbers in {out}")


def _whole(source: str, base: str | None) -> tuple[str, Any, dict[str, Any], Any]:
    """What the source is, the model, its weights, its tokenizer.

    Raises:
        UserError: the source is neither an adapter nor a checkpoint.
    """
    from rlhf_dist.models.adapters import find_adapter
    from rlhf_dist.models.loading import load_merged, load_tokenizer, load_tokenizer_folder, local
    from rlhf_dist.models.lora import named_weights

    folder = Path(local(source))
    if _is_checkpoint(folder):
        from rlhf_dist.engines.consolidation import consolidate

        whole = consolidate(folder, base)
        return "checkpoint put together", whole.model, whole.weights, _tokenizer(whole)
    adapter = find_adapter(local(source), base)
    if adapter is None:
        below = sorted(path.name for path in folder.iterdir() if _is_checkpoint(path)) if folder.is_dir() else []
        fix = f"name one of its subfolders: {', '.join(below)}" if below else "give the folder itself, not one above or below it"
        raise UserError("there is neither a PEFT adapter nor an engine's or DeepSpeed's checkpoint", where=source, fix=fix)
    model = load_merged(adapter)
    tokenizer = load_tokenizer_folder(source) if adapter.has_tokenizer else load_tokenizer(adapter.base)
    return "adapter merged", model, {name: compute() for name, _, compute in named_weights(model)}, tokenizer


def _tokenizer(whole: Any) -> Any:
    """Of a checkpoint: that of the model it was trained from, and a classifier's with the pad it was trained with."""
    from rlhf_dist.models.loading import load_tokenizer
    from rlhf_dist.models.reward_model import tokenizer_for

    return load_tokenizer(whole.base) if whole.model.can_generate() else tokenizer_for(whole.model.config, whole.base)


def _is_checkpoint(folder: Path) -> bool:
    """Looks before the engines are imported: deepspeed takes seconds."""
    from rlhf_dist.engines.state_files import INDEX

    return (folder / INDEX).is_file() or (folder / "engine").is_dir() or (folder / "latest").is_file()
