"""Hugging Face models and tokenizers, loaded with every trap named: stop tokens from both configs, no pad token, no dropout.

Hub names are read from the local cache only: a folder that is misspelt is then refused at once, and ranks do not download side by side.
Wherever a model's folder is named, that of a peft adapter may stand: its base model is loaded and the adapter merged into it.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from rlhf_dist.config.engines import Dtype, EngineSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.models.adapters import Adapter, check_fit, find_adapter, merge_adapter
from rlhf_dist.models.padding import grow_embeddings, name_pad
from rlhf_dist.models.quantisation import check_layers, quantise

TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLASSIFIER = "ForSequenceClassification"
"""How transformers ends the names of its sequence classifiers."""
FAULTS = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, StrictDataclassError, SafetensorError)
"""What transformers raises on a folder that it cannot read."""


def load_config(path: str, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration; of an adapter its base model's, and of a classifier's what training would have made of it.

    That is the labels of the head that the adapter holds, the pad of the tokenizer beside it, and every token that ends a text: classifiers
    have no generation_config.json (decision 0009).

    Raises:
        UserError: neither a folder with a config.json nor a cached hub name; an adapter whose base model is not there.
    """
    adapter = _adapter(path)
    if adapter is None:
        return _read_config(path, trust_remote_code=trust_remote_code)
    fix = "set base_model_name_or_path in adapter_config.json to the folder of the base model"
    if _adapter(adapter.base) is not None:
        raise UserError(f"the adapter's base model {adapter.base} is itself an adapter", where=path, fix=fix)
    try:
        return _adapted_config(adapter, trust_remote_code=trust_remote_code)
    except UserError as error:
        raise UserError(f"the adapter's base model cannot be used: {error.what}", where=f"{path}, base {error.where}", fix=fix) from error


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, left as it is: padding never depends on its pad token. Of an adapter its own, or else its base model's.

    Raises:
        UserError: the folder has no tokenizer.
    """
    load_config(path, trust_remote_code=trust_remote_code)
    return load_tokenizer_folder(tokenizer_folder(path), trust_remote_code=trust_remote_code)


def tokenizer_folder(path: str) -> str:
    """Where a model's tokenizer is looked for."""
    adapter = _adapter(path)
    return path if adapter is None or adapter.has_tokenizer else adapter.base


def load_tokenizer_folder(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer that may stand without a model beside it.

    Raises:
        UserError: the folder has no tokenizer.
    """
    try:
        return AutoTokenizer.from_pretrained(local(path), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more exact on a file that it cannot read
        fix = "save the tokenizer beside the model (tokenizer.json)"
        raise UserError(f"cannot load a tokenizer: {_reason(error)}", where=path, fix=fix) from error


def load_causal_lm(section: EngineSection, path: str) -> nn.Module:
    """A causal LM in the section's precision, dropout off, in eval mode; in 4 bits where the section says so.

    Raises:
        UserError: no such model, or it is no causal LM, or weights are missing from the folder; an adapter made for another base model;
            a layer that cannot be quantised.
    """
    config = load_config(path, trust_remote_code=section.trust_remote_code)
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_decoder:  # transformers would load an encoder, which sees the answer
        raise UserError(
            f"{config.model_type} is an encoder, not a causal LM", where=path, fix="use a decoder-only model (Llama, Qwen, GPT-2, Gemma …)"
        )
    return load_pretrained(AutoModelForCausalLM, section, path)


def load_token_scorer(section: EngineSection, path: str, *, zero_head: bool) -> nn.Module:
    """A backbone of its own with a one-output head, as a sequence-classification model: it starts from a causal LM or from a reward model.

    Args:
        section: precision, quantisation and attention kernel.
        path: Hugging Face folder, or that of an adapter.
        zero_head: start the head at zero, as NUMERICS §1 has it; otherwise the folder must hold a trained head.

    Raises:
        UserError: the architecture has no classification form, or a head is asked for that the folder does not hold.
    """
    fresh = {"score.weight", "score.bias"} if zero_head else set()
    model = load_pretrained(AutoModelForSequenceClassification, section, path, fresh, num_labels=1)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        what = f"a classifier of the kind {model.config.model_type} has no linear `score` head, as trained reward and value models need"
        raise UserError(what, where=path, fix="use a decoder-only model (Llama, Qwen, Mistral, GPT-2, Gemma …)")
    if zero_head:
        nn.init.zeros_(head.weight)
        if head.bias is not None:
            nn.init.zeros_(head.bias)
    return model


def stop_tokens(path: str, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False) -> tuple[int, ...]:
    """All ids that end a completion: from generation_config.json and config.json; the tokenizer's eos where both are silent.

    Raises:
        UserError: no such model, or a generation_config.json that cannot be read.
    """
    ids = {*_ids(load_config(path, trust_remote_code=trust_remote_code)), *_ids(generation_settings(path))}
    if not ids and tokenizer.eos_token_id is not None:
        ids = {int(tokenizer.eos_token_id)}
    return tuple(sorted(ids))


def name_stops(config: Any, stops: Collection[int]) -> None:
    """Keeps several tokens that end a completion in a classifier's configuration, in place: it is saved without generation_config.json."""
    if len(stops) > 1:
        config.eos_token_id = sorted(stops)


def generation_settings(path: str) -> GenerationConfig | None:
    """A model's generation_config.json, None where the folder has no such file: it is optional. Of an adapter, its base model's.

    Raises:
        UserError: the file cannot be read.
    """
    adapter = _adapter(path)
    folder = local(path if adapter is None else adapter.base)
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError as error:
        if (Path(folder) / "generation_config.json").is_file():
            fix = "mend or remove it: it may name tokens that end a completion"
            raise UserError(f"cannot read generation_config.json: {_reason(error)}", where=path, fix=fix) from error
        return None


def precision_of(model: Any) -> Dtype:
    """The precision of a model, or of the folder that a configuration describes; fp32 where it does not say."""
    return next((name for name, dtype in TORCH_DTYPES.items() if getattr(model, "dtype", None) == dtype), "fp32")


def context_length(config: Any) -> int | None:
    """The model's longest sequence in tokens, None where its configuration does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def switch_dropout_off(model: nn.Module) -> None:
    """Sets every dropout probability to 0, so that training mode (needed by gradient checkpointing) samples nothing.

    They are numbers with "drop" in their name, on modules or (GPT-Neo, Falcon and others read them there) in the configuration.
    """
    config: Any = getattr(model, "config", None)
    configs = [] if config is None else [config, config.get_text_config()]
    for holder in (*model.modules(), *configs):
        rates = [name for name, value in vars(holder).items() if "drop" in name and isinstance(value, float)]
        for name in rates:
            setattr(holder, name, 0.0)
        if isinstance(holder, nn.modules.dropout._DropoutNd):
            holder.p = 0.0


def local(path: str) -> str:
    """A path or hub name as the libraries take it: `~` is the shell's, not theirs."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


def load_pretrained(kind: Any, section: EngineSection, path: str, fresh: Collection[str] = (), **options: Any) -> Any:
    """A Hugging Face model of a class: an adapter merged, dropout off, quantised, in eval mode, without key/value cache.

    Args:
        kind: AutoModelForCausalLM or AutoModelForSequenceClassification.
        section: precision, quantisation and attention kernel.
        path: Hugging Face folder, or that of an adapter.
        fresh: weights that need not be in the folder, nor have the right shape there, because the caller sets them.
        options: of `from_pretrained`.

    Raises:
        UserError: the folder is not of the right kind or not complete; see `merge_adapter`, `quantise`.
    """
    config, adapter = load_config(path, trust_remote_code=section.trust_remote_code), _adapter(path)
    try:
        model, report = kind.from_pretrained(
            local(path if adapter is None else adapter.base),
            dtype=TORCH_DTYPES[section.dtype],
            attn_implementation=section.attention,
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # looked at below, where the message can name them
            **(_labels(kind, adapter) | options),
        )
    except FAULTS as error:
        fix = "give a complete Hugging Face folder of the right kind, in safetensors"
        raise UserError(f"cannot load the model: {_reason(error)}", where=path, fix=fix) from error
    given = {*fresh, *(adapter.whole if adapter else ())}
    if kind is AutoModelForSequenceClassification:
        _refuse_untrained_head(path, {name for name in report["missing_keys"] if name.split(".")[0] != model.base_model_prefix} - given)
    _refuse(path, "not in the folder", set(report["missing_keys"]) - given)
    _refuse(path, "of another shape than the configuration says", {name for name, *_ in report["mismatched_keys"]} - given)
    if adapter is not None:
        _merge(model, adapter, config, fresh)
        model.name_or_path = model.config.name_or_path = path  # what an adapter on top of this one stands on
    switch_dropout_off(model)
    model.get_input_embeddings().padding_idx = None  # the pad of many a model is its eos, whose row would never learn
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # nothing reads it: training sees whole rows, the sampler keeps a cache of its own
    if section.quantize == "nf4":
        quantise(model, TORCH_DTYPES[section.dtype], path)
    return model.eval()


def load_merged(adapter: Adapter) -> Any:
    """An adapter's base model in the precision of its folder, with the adapter merged.

    Raises:
        UserError: as `load_pretrained`.
    """
    config = _adapted_config(adapter)
    classifies = adapter.classifies or any(str(name).endswith(CLASSIFIER) for name in config.architectures or ())
    kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    model = load_pretrained(kind, EngineSection(dtype=precision_of(config)), adapter.base, adapter.whole, **_labels(kind, adapter))
    _merge(model, adapter, config)
    return model


def check_loadable(kind: Any, section: EngineSection, path: str, *, on_gpu: bool) -> None:
    """What can be said of adapter and quantisation before weights are loaded: the model is built without memory (meta device).

    Args:
        kind, section, path: as for `load_pretrained`. on_gpu: where the engine will be.

    Raises:
        UserError: as `load_pretrained`.
    """
    config, adapter = load_config(path, trust_remote_code=section.trust_remote_code), _adapter(path)
    if adapter is None and section.quantize == "none":
        return
    try:
        with torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=section.trust_remote_code)
    except FAULTS as error:
        raise UserError(f"cannot build the model: {_reason(error)}", where=path, fix="give a model folder of the right kind") from error
    if adapter is not None:
        check_fit(model, adapter, ("score.weight", "score.bias") if adapter.labels is None else ())
    if section.quantize == "nf4":
        check_layers(model, path, on_gpu=on_gpu)


def _adapted_config(adapter: Adapter, *, trust_remote_code: bool = False) -> Any:
    """See `load_config`."""
    config = _read_config(adapter.base, trust_remote_code=trust_remote_code)
    if not adapter.scores:
        return config
    if adapter.labels is not None:
        config.num_labels = adapter.labels
        config.architectures = [str(name).replace("ForCausalLM", CLASSIFIER) for name in config.architectures or ()]
    if adapter.has_tokenizer:
        pad = load_tokenizer_folder(str(adapter.folder), trust_remote_code=trust_remote_code).pad_token_id
        if pad is not None:
            name_pad(config, int(pad))
    name_stops(config, {*_ids(config), *_ids(generation_settings(adapter.base))})
    return config


def _merge(model: Any, adapter: Adapter, config: Any, fresh: Collection[str] = ()) -> None:
    """Merges an adapter into its base model. A classifier's was trained with the pad and the stop tokens of `config`, so they come first.

    Args:
        config: of the adapter. fresh: see `check_fit`.
    """
    if adapter.scores:
        grow_embeddings(model, config.get_text_config().vocab_size)
        if (pad := config.get_text_config().pad_token_id) is not None:
            name_pad(model.config, pad)
        name_stops(model.config, _ids(config))
    merge_adapter(model, adapter, fresh)


def _labels(kind: Any, adapter: Adapter | None) -> dict[str, int]:
    """An adapter that holds a classifier's head says how many outputs it has; its base model, a causal LM, does not know."""
    labels = adapter.labels if adapter is not None and kind is AutoModelForSequenceClassification else None
    return {} if labels is None else {"num_labels": labels}


def _adapter(path: str) -> Adapter | None:
    return find_adapter(local(path))


def _refuse(path: str, what: str, names: Collection[str]) -> None:
    if names:
        fix = "give a complete checkpoint of this architecture"
        raise UserError(f"{len(names)} weights are {what}, {min(names)} first; they would be random", where=path, fix=fix)


def _refuse_untrained_head(path: str, names: Collection[str]) -> None:
    head = sorted(names)
    if head:
        raise UserError(
            f"this is not a trained sequence classifier: the folder does not hold {', '.join(head[:3])}{' …' if len(head) > 3 else ''}, "
            "which would be random",
            where=path,
            fix="give a folder saved from AutoModelForSequenceClassification; a language model must first be trained as a reward model",
        )


def _read_config(path: str, *, trust_remote_code: bool) -> Any:
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not (path and Path(local(path)).is_dir()):
        fix = "give a Hugging Face folder (config.json, safetensors, tokenizer)"
        raise UserError("there is no model folder of this name", where=path, fix=fix)
    try:
        return AutoConfig.from_pretrained(local(path), trust_remote_code=trust_remote_code, local_files_only=True)
    except FAULTS as error:
        if not Path(local(path)).is_dir():
            fix = f"give a Hugging Face folder, or download the model before: hf download {path}"
            raise UserError("there is neither a folder of this name nor a model in the local cache", where=path, fix=fix) from error
        fix = "give a Hugging Face folder (config.json, safetensors, tokenizer)"
        raise UserError(f"cannot read the model's configuration: {_reason(error)}", where=path, fix=fix) from error


def _ids(config: Any) -> list[int]:
    value = getattr(config, "eos_token_id", None)
    if value is None and hasattr(config, "get_text_config"):
        value = getattr(config.get_text_config(), "eos_token_id", None)
    return [] if value is None else [int(v) for v in (value if isinstance(value, list | tuple) else [value])]


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
