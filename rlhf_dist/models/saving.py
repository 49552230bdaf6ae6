"""Hugging Face folders and PEFT adapter folders out of weights that an engine, or a checkpoint, gave."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from rlhf_dist.config.engines import Dtype
from rlhf_dist.models.adapters import PREFIX, WEIGHTS, LowRank, find_adapter, low_rank_pairs, part_of
from rlhf_dist.models.loading import precision_of
from rlhf_dist.models.lora import trained_weights
from rlhf_dist.models.padding import with_rows
from rlhf_dist.models.quantisation import in_4_bits

ORIGIN = "origin.json"


@dataclass(frozen=True)
class Origin:
    """What a checkpoint of trained weights was trained from.

    base: the model's folder as it was given. quantize: how its frozen layers were held. lora: r, alpha and target_modules of its adapters,
    None where all weights are trained. head: what is trained whole beside the adapters.
    """

    base: str
    dtype: Dtype
    quantize: Literal["none", "nf4"] = "none"
    lora: dict[str, Any] | None = None
    head: str | None = None


def save_model(model: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes a Hugging Face folder, with the key/value cache on again and the generation settings as they came.

    Published models name a temperature without do_sample; transformers reads that, and refuses to write it.

    Args:
        model: whose class and configuration describe the weights; its own may be anything.
        weights: under Hugging Face names; a tied one once.
        folder: made if needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generation, cache = getattr(model, "generation_config", None), getattr(model.config, "use_cache", None)
    model.generation_config = GenerationConfig()
    if cache is not None:
        model.config.use_cache = True
    try:
        model.save_pretrained(folder, state_dict=dict(weights))
    finally:
        model.generation_config = generation
        if cache is not None:
            model.config.use_cache = cache
    if generation is not None and model.can_generate():
        generation.to_json_file(folder / "generation_config.json")


def write_adapter(model: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes what was trained as a PEFT folder: `PeftModel.from_pretrained(base, folder)` answers as the model does.

    Where the base model was itself given as an adapter folder, the new adapter stands on a merged model that lies nowhere. Then both are
    written as one, which is exact: s₁B₁A₁ + s₂B₂A₂ = [s₁B₁ s₂B₂] [A₁; A₂]. It names the base model of the first.

    Args:
        model: with adapters (`lora.add_adapter`).
        weights: the trained ones, under the model's own names.
        folder: made if needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = adapter_config(model, weights)
    named = {name.removeprefix(PREFIX).replace(".default", ""): weight.cpu().contiguous() for name, weight in weights.items()}
    first = find_adapter(str(model.get_base_model().name_or_path))
    if first is not None:
        modules = dict(model.get_base_model().named_modules())
        held = _with_new_rows(first.tensors(), modules)
        pairs = {name: pair for name, pair in low_rank_pairs(held, first.scale).items() if name in modules}
        second = low_rank_pairs(named, lambda layer, rank: config.lora_alpha / rank)
        whole = {name: tensor for name, tensor in (held | named).items() if part_of(name) is None}
        named = {name: tensor for name, tensor in whole.items() if name in named or name.rpartition(".")[0] in modules}
        config.base_model_name_or_path = first.base
        named |= _stacked(pairs, second, config)
    config.save_pretrained(str(folder))
    save_file({f"{PREFIX}{name}": tensor for name, tensor in named.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def write_origin(model: Any, folder: Path) -> None:
    """Writes beside a checkpoint of trained weights what it takes to make a whole model of them: config.json, and `Origin` as JSON."""
    adapted = hasattr(model, "peft_config")
    plain = model.get_base_model() if adapted else model
    config = copy.deepcopy(plain.config)
    config.architectures = [type(plain).__name__]
    if hasattr(config, "use_cache"):
        config.use_cache = True
    config.save_pretrained(folder)
    quantised = any(map(in_4_bits, plain.modules()))
    lora, head = None, None
    if adapted:
        settings = adapter_config(model, [name for name, *_ in trained_weights(model)])
        lora = {"r": settings.r, "alpha": settings.lora_alpha, "target_modules": settings.target_modules}
        head = next(iter(settings.modules_to_save or ()), None)
    origin = Origin(str(plain.name_or_path), precision_of(plain), "nf4" if quantised else "none", lora, head)
    (folder / ORIGIN).write_text(json.dumps(asdict(origin), indent=2) + "\n", encoding="utf-8")


def adapter_config(model: Any, trained: Collection[str]) -> Any:
    """A model's adapter settings as its PEFT folder has them.

    Args:
        trained: names of the trained weights: what is no adapter among them is a head that is trained whole.
    """
    config = copy.deepcopy(model.peft_config["default"])
    heads = sorted({name.removeprefix(PREFIX).split(".")[0] for name in trained if "lora_" not in name})
    config.base_model_name_or_path = str(model.get_base_model().name_or_path)
    config.inference_mode, config.exclude_modules = True, None
    config.target_modules = sorted(config.target_modules)
    config.modules_to_save = heads or None
    config.task_type = "SEQ_CLS" if heads else "CAUSAL_LM"
    return config


def _with_new_rows(tensors: Mapping[str, Tensor], modules: Mapping[str, Any]) -> dict[str, Tensor]:
    """An adapter's tensors, with zeros for tokens that its base model's embeddings have gained since (a pad)."""
    grown = dict(tensors)
    for name, tensor in tensors.items():
        part = part_of(name)
        layer = modules.get(part["layer"] if part else name.rpartition(".")[0])
        rows = getattr(getattr(layer, "base_layer", layer), "num_embeddings", None)
        if rows is not None and (part is None or part["side"] == "A"):
            grown[name] = with_rows(tensor, rows, 0 if part is None else 1)
    return grown


def _stacked(first: Mapping[str, LowRank], second: Mapping[str, LowRank], config: Any) -> dict[str, Tensor]:
    """Tensors of the sum of two adapters; the config then says their ranks, and that the scale of each layer is 1."""
    named, ranks = {}, {}
    for layer in sorted({*first, *second}):
        pairs = [pairs[layer] for pairs in (first, second) if layer in pairs]
        infix, end = (".lora_embedding_", "") if pairs[0].embedding else (".lora_", ".weight")
        named[f"{layer}{infix}A{end}"] = torch.cat([pair.a.float() for pair in pairs], 0)
        named[f"{layer}{infix}B{end}"] = torch.cat([pair.b.float() * pair.scale for pair in pairs], 1)
        ranks[layer] = sum(pair.a.shape[0] for pair in pairs)
    config.target_modules = sorted(ranks)
    config.r = config.lora_alpha = max(ranks.values())
    config.rank_pattern = {layer: rank for layer, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    return named
