"""Whole weights out of the files of an engine's checkpoint, or of the shards of a DeepSpeed one, whatever its ZeRO stage and its number of
ranks; adapters merged.

DeepSpeed's shards are pickles. They are read with `weights_only`, so that they can name nothing but tensors, plain containers and the four
kinds of objects that DeepSpeed writes: a file that would run code while it is read is refused.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_dist.config.engines import EngineSection, LoraSection
from rlhf_dist.config.errors import UserError, first_line
from rlhf_dist.engines.process import quiet_deepspeed
from rlhf_dist.engines.state_files import INDEX, SavedState
from rlhf_dist.models.loading import CLASSIFIER, TORCH_DTYPES, generation_settings, load_config, load_pretrained, precision_of
from rlhf_dist.models.lora import add_adapter, named_weights
from rlhf_dist.models.padding import grow_embeddings
from rlhf_dist.models.saving import ORIGIN, Origin

LATEST = "latest"
TAG = "engine"
"""The subfolder of the shards in a checkpoint that our engines wrote through DeepSpeed, which they did at first."""
OURS = "model."
"""The name of the Hugging Face model inside the modules that our engines train."""


@dataclass(frozen=True)
class Whole:
    """A model's class and configuration, all its weights under Hugging Face names, and the folder that its tokenizer comes from."""

    model: Any
    weights: dict[str, Tensor]
    base: str


def consolidate(folder: Path, base: str | None = None) -> Whole:
    """Puts a checkpoint's shards together.

    Args:
        folder: what a `DeepSpeedEngine` saved, or another program's ZeRO checkpoint.
        base: the model that it was trained from, where the checkpoint does not name it or names a folder that is no longer there.

    Raises:
        UserError: the shards are not complete or are no data; no base model; weights that do not fit the model.
    """
    state = read_shards(folder)
    origin = _origin(folder, base)
    if origin.lora is not None:
        return _merged(folder, state, origin)
    if any(".lora_" in name for name in state):
        fix = "export the adapter folder (adapter_config.json) that was saved beside it"
        raise UserError("the checkpoint holds adapters of another program", where=str(folder), fix=fix)
    return _plain(folder, state, origin)


def read_shards(folder: Path) -> dict[str, Tensor]:
    """Every weight that a checkpoint holds, under its module's names: fp32 where it was trained, else as it was held.

    Raises:
        UserError: files are missing or damaged, or one of them holds anything but data.
    """
    if (folder / INDEX).is_file():
        return SavedState(folder).weights()
    tag = TAG if (folder / TAG).is_dir() else (folder / LATEST).read_text(encoding="utf-8").strip()
    shards = folder / tag
    try:
        with _data_only(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            if any(shards.glob("*_optim_states.pt")):
                from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

                return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag))
            state = torch.load(shards / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)["module"]
            return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    except pickle.UnpicklingError as error:
        what = "the checkpoint's files hold more than data: reading them could run code"
        fix = "give a checkpoint that DeepSpeed wrote, of a program that you trust"
        raise UserError(f"{what} ({first_line(error)[:200]})", where=str(shards), fix=fix) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = "give a folder that holds the files of all ranks"
        raise UserError(f"the checkpoint is not complete: {what}", where=str(shards), fix=fix) from error


def _plain(folder: Path, state: Mapping[str, Tensor], origin: Origin) -> Whole:
    """A model of which every weight was trained."""
    source = str(folder) if (folder / "config.json").is_file() else origin.base
    config = load_config(source)
    with torch.device("meta"):
        model = _kind(config).from_config(config)
    expected = {name for name, *_ in named_weights(model)}
    prefix = max((OURS, ""), key=lambda each: sum(f"{each}{name}" in state for name in expected))
    found = {name: state[f"{prefix}{name}"] for name in expected if f"{prefix}{name}" in state}
    shapes = {name: parameter.shape for name, parameter in model.state_dict().items()}
    wrong = sorted(name for name in expected if name not in found or found[name].shape != shapes[name])
    if wrong:
        what = f"{len(wrong)} of {len(expected)} weights of the model are not in the checkpoint, {wrong[0]} first"
        raise UserError(what, where=str(folder), fix="name the model that was trained with --base")
    if (settings := generation_settings(origin.base)) is not None and model.can_generate():
        model.generation_config = settings
    return Whole(model, {name: _rounded(tensor, origin) for name, tensor in found.items()}, origin.base)


def _merged(folder: Path, state: Mapping[str, Tensor], origin: Origin) -> Whole:
    """The base model, loaded and held as in training, with the adapters that the checkpoint holds."""
    config = load_config(str(folder))
    section = EngineSection(dtype=origin.dtype, quantize=origin.quantize)
    fresh = {f"{origin.head}.{part}" for part in ("weight", "bias")} if origin.head else set()
    options = {"num_labels": config.num_labels} if origin.head else {}
    model = load_pretrained(_kind(config), section, origin.base, fresh, **options)
    grow_embeddings(model, config.get_text_config().vocab_size)  # for a pad token that the base model has not
    adapted = add_adapter(model, LoraSection.model_validate(origin.lora), 0, origin.head)
    places = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    given = {name.removeprefix(OURS): tensor for name, tensor in state.items()}
    odd = sorted(name for name, place in places.items() if name not in given or given[name].shape != place.shape)
    if odd:
        what = f"the adapter was made for another base model: {odd[0]} does not fit"
        raise UserError(what, where=f"{folder}, base model {origin.base}", fix="name the model that was trained with --base")
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(given[name])
    model.config = config
    return Whole(model, {name: compute().cpu().clone() for name, _, compute in named_weights(adapted)}, origin.base)


def _origin(folder: Path, base: str | None) -> Origin:
    path = folder / ORIGIN
    if path.is_file():
        origin = Origin(**json.loads(path.read_text(encoding="utf-8")))
        origin = replace(origin, base=base or origin.base)
    else:
        named = base or (str(folder) if (folder / "config.json").is_file() else "")
        if not named:
            fix = "name the folder of the model that was trained with --base"
            raise UserError("the checkpoint does not say which model was trained", where=str(folder), fix=fix)
        origin = Origin(named, precision_of(load_config(named)), "none")
    try:
        load_config(origin.base)
    except UserError as error:
        fix = "name the folder of the model that was trained with --base"
        raise UserError(f"the model that was trained cannot be found: {error.what}", where=error.where, fix=fix) from error
    return origin


def _kind(config: Any) -> Any:
    classifies = any(str(name).endswith(CLASSIFIER) for name in config.architectures or ())
    return AutoModelForSequenceClassification if classifies else AutoModelForCausalLM


def _rounded(tensor: Tensor, origin: Origin) -> Tensor:
    return tensor.detach().to(TORCH_DTYPES[origin.dtype]) if tensor.is_floating_point() else tensor


@contextmanager
def _data_only() -> Iterator[None]:
    """Every `torch.load` inside takes data only: DeepSpeed's own reader asks for anything, and the variable overrules it."""
    quiet_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before
