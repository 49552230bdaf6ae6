"""What weights a Hugging Face folder holds, by name and shape: what a sampler that was loaded from it must be sent in an update."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from rlhf_dist.config.errors import UserError

TIED_HEAD = "lm_head.weight"


def weight_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    """Read from the headers alone. A head that is tied to the embeddings is left out, as exports do.

    Raises:
        UserError: no config.json, or no safetensors.
    """
    path = Path(folder)
    files = sorted(path.glob("*.safetensors"))
    if not files or not (path / "config.json").is_file():
        fix = "name a folder with config.json and *.safetensors, as rlhf-dist exports them"
        raise UserError("not a Hugging Face folder that a sampler can be synchronised with", where=folder, fix=fix)
    shapes = {name: shape for file in files for name, shape in _header(file).items()}
    if json.loads((path / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings"):
        shapes.pop(TIED_HEAD, None)
    return shapes


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="pt") as weights:
        return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118 (not a dict)
