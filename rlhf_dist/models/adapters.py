"""PEFT adapter folders (adapter_config.json, adapter_model.safetensors), read and merged into their base model."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rlhf_dist.config.errors import UserError
from rlhf_dist.models.lora import low_rank_delta, tied_weight, transposes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_PART = re.compile(r"^(?P<layer>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?$")
_UNDERSTOOD = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "fan_in_fan_out", "bias", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "ensure_weight_tying",
    "megatron_config", "megatron_core", "corda_config", "eva_config", "loftq_config", "lora_ga_config", "runtime_config",
}  # fmt: skip
"""Settings that are read here, or that say which layers were adapted (the tensors' names say so too) or how training began and went."""
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Ways to start an adapter that leave the base as it is; the others (PiSSA, OLoRA …) belong to a changed base."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter folder. base: what its base model is loaded from; shapes: of the saved tensors, by name in the base model."""

    folder: Path
    base: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def whole(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights that it holds whole: a classifier's head."""
        return {name: shape for name, shape in self.shapes.items() if part_of(name) is None}

    @property
    def classifies(self) -> bool:
        """Whether it was trained on a sequence classifier."""
        return self.config.get("task_type") == "SEQ_CLS"

    @property
    def labels(self) -> int | None:
        """Outputs of the classifier's head that it holds, None where it holds none."""
        rows = {shape[0] for name, shape in self.whole.items() if name in ("score.weight", "classifier.weight")}
        return rows.pop() if rows else None

    @property
    def scores(self) -> bool:
        """Whether what it makes of its base model is a classifier."""
        return self.classifies or self.labels is not None

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the adapter."""
        return any((self.folder / name).is_file() for name in _TOKENIZER)

    def scale(self, layer: str, rank: int) -> float:
        """alpha / r of a layer, or alpha / √r (rsLoRA, arXiv 2312.03732)."""
        from peft.utils.other import get_pattern_key

        patterns: dict[str, float] = self.config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(list(patterns), layer), float(self.config["lora_alpha"]))
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def tensors(self) -> dict[str, Tensor]:
        """What it holds, by name in the base model."""
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            return {_plain(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@dataclass
class LowRank:
    """The two matrices of an adapted layer: its weight grows by scale · B A, transposed where the layer keeps it so (an embedding)."""

    a: Tensor
    b: Tensor
    scale: float
    embedding: bool


def find_adapter(path: str, base: str | None = None) -> Adapter | None:
    """The adapter of a folder (or of a cached hub name), None where it holds a model.

    Args:
        path: as the libraries take it.
        base: the base model to use in place of the one that the adapter names.

    Raises:
        UserError: an adapter that is not LoRA, or a kind of LoRA that cannot be merged exactly; pickled weights; no base model.
    """
    folder = _folder(path)
    if folder is None or not (folder / CONFIG).is_file() or any(folder.glob("model*.safetensors")):
        return None
    config = _read_config(folder)
    return Adapter(folder, base or _base(config, folder), config, _read_shapes(folder))


def check_fit(model: Any, adapter: Adapter, fresh: Collection[str] = ()) -> None:
    """Whether every tensor of an adapter has its place in a model, which may be on the meta device.

    Args:
        fresh: weights of the model that the caller sets; what the adapter holds of them is left out.

    Raises:
        UserError: the first tensor without a place: the adapter was made for another base model.
    """
    modules, weights = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    for name, shape in sorted(adapter.shapes.items()):
        part = part_of(name)
        if name in fresh or _absent_head(model, adapter, part["layer"] if part else name):
            continue
        if part is None:
            if name not in weights:
                raise _misfit(adapter, f"it holds {name}, which this model lacks")
            expected, got = tuple(weights[name].shape), shape
        else:
            layer = modules.get(part["layer"])
            if not isinstance(getattr(layer, "weight", None), Tensor) or layer.weight.dim() != 2 or len(shape) != 2:  # type: ignore[union-attr]
                raise _misfit(adapter, f"it adapts {part['layer']}, and this model has no such layer")
            if layer.weight is tied_weight(model):  # type: ignore[union-attr]
                raise UserError(
                    f"the adapter changes {part['layer']}, which is tied to the head: merged, it would change both",
                    where=str(adapter.folder),
                    fix="use an adapter that leaves the embeddings and the head alone",
                )
            outputs, inputs = layer.weight.shape if not _stored_transposed(layer, part) else reversed(layer.weight.shape)  # type: ignore[union-attr]
            expected, got = ((inputs,), shape[1:]) if part["side"] == "A" else ((outputs,), shape[:1])
        if expected != got:
            raise _misfit(adapter, f"its {name} is made for size {_size(got)}, this model has {_size(expected)}")


def merge_adapter(model: Any, adapter: Adapter, fresh: Collection[str] = ()) -> None:
    """Adds an adapter to the weights of its base model, in place: in fp32, rounded once to the model's precision.

    Args:
        fresh: see `check_fit`.

    Raises:
        UserError: see `check_fit`; a layer of which one of the two matrices is missing.
    """
    check_fit(model, adapter, fresh)
    with torch.no_grad():
        for name, tensor in adapter.tensors().items():
            if part_of(name) is None and name not in fresh and not _absent_head(model, adapter, name):
                model.get_parameter(name).copy_(tensor)
        for name, pair in low_rank_pairs(adapter.tensors(), adapter.scale).items():
            if not _absent_head(model, adapter, name):
                layer = model.get_submodule(name)
                delta = low_rank_delta(pair.a, pair.b, pair.scale, transposed=pair.embedding or transposes(layer))
                layer.weight.copy_(layer.weight.float() + delta)


def low_rank_pairs(tensors: Mapping[str, Tensor], scale: Callable[[str, int], float]) -> dict[str, LowRank]:
    """The matrices of every adapted layer.

    Args:
        tensors: under the names of a PEFT file without their prefix. scale: of a layer with a rank.

    Raises:
        UserError: a layer has only one of the two.
    """
    sides: dict[str, dict[str, Tensor]] = defaultdict(dict)
    embeddings = set()
    for name, tensor in tensors.items():
        part = part_of(name)
        if part is not None:
            sides[part["layer"]][part["side"]] = tensor
            embeddings |= {part["layer"]} if part["embedding"] else set()
    for layer, pair in sides.items():
        if len(pair) != 2:
            fix = "save the adapter anew: every layer has a lora_A and a lora_B"
            raise UserError(f"the adapter holds only lora_{next(iter(pair))} of a layer", where=layer, fix=fix)
    return {layer: LowRank(pair["A"], pair["B"], scale(layer, pair["A"].shape[0]), layer in embeddings) for layer, pair in sides.items()}


def part_of(name: str) -> re.Match[str] | None:
    """Which matrix of which layer a tensor of an adapter is; None for a weight that it holds whole."""
    return _PART.match(name)


def _folder(path: str) -> Path | None:
    """A folder, or where the local cache keeps a hub name."""
    if Path(path).is_dir() or path.startswith((".", "/")) or path.count("/") != 1:
        return Path(path) if path else None
    try:
        found = try_to_load_from_cache(path, CONFIG)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _read_config(folder: Path) -> dict[str, Any]:
    path, fix = folder / CONFIG, "give a folder that peft saved"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the adapter's configuration: {error}", where=str(path), fix=fix) from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UserError("this is no configuration of a peft adapter", where=str(path), fix=fix)
    from peft import LoraConfig

    merge = "merge it with peft (merge_and_unload), save the merged model and give that folder"
    if config["peft_type"] != "LORA":
        raise UserError(f"the adapter is of the kind {config['peft_type']}; only LoRA is read", where=str(path), fix=merge)
    usual = LoraConfig().to_dict()  # of what this peft does not know, only nothing is usual
    other = [name for name, value in config.items() if name not in _UNDERSTOOD and value and value != usual.get(name)]
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        other.append(f"init_lora_weights={config['init_lora_weights']}")
    if other:
        raise UserError(f"the adapter uses {', '.join(other)}, which is more than LoRA", where=str(path), fix=merge)
    if "lora_alpha" not in config:
        raise UserError("the adapter's configuration has no lora_alpha", where=str(path), fix=fix)
    return config


def _base(config: dict[str, Any], folder: Path) -> str:
    """A relative folder is looked for from the current folder, then from the adapter's. What is neither may be a hub name."""
    named = str(config.get("base_model_name_or_path") or "")
    if not named:
        fix = "set base_model_name_or_path in adapter_config.json to the folder of the base model"
        raise UserError("the adapter does not name its base model", where=str(folder / CONFIG), fix=fix)
    beside = folder / named
    return str(beside) if not Path(named).expanduser().is_dir() and beside.is_dir() else named


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        what = "the adapter's weights are pickled, and a pickle can run code" if pickled else "the adapter has no weights"
        raise UserError(what, where=str(folder), fix=f"save it with peft as {WEIGHTS}")
    try:
        with safe_open(path, framework="pt") as file:
            return {_plain(name): tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read the adapter's weights: {error}", where=str(path), fix="copy the file again") from error


def _plain(name: str) -> str:
    """A tensor's name in the base model. Of embeddings and head that it adapts, peft keeps the base weight too."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def _absent_head(model: Any, adapter: Adapter, name: str) -> bool:
    """Whether this is a causal LM's head in a model that has none: a classifier starts from the rest."""
    if adapter.classifies or model.get_output_embeddings() is not None:
        return False
    return not name.startswith(f"{model.base_model_prefix}.")


def _stored_transposed(layer: Any, part: re.Match[str]) -> bool:
    return bool(part["embedding"]) or transposes(layer)


def _misfit(adapter: Adapter, what: str) -> UserError:
    return UserError(
        f"the adapter was made for another base model: {what}",
        where=f"{adapter.folder}, base model {adapter.base}",
        fix="name the base model it was trained on as base_model_name_or_path in adapter_config.json",
    )


def _size(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
