"""Hugging Face models and tokenizers, loaded with every trap named: stop tokens from both configs, no pad token, no dropout.

Hub names are read from the local cache only: a folder that is misspelt is then refused at once, and ranks do not download side by side.
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

from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.errors import UserError

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAULTS = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, StrictDataclassError, SafetensorError)
"""What transformers raises on a folder that it cannot read."""


def load_config(path: str, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration.

    Raises:
        UserError: neither a folder with a config.json nor a cached hub name.
    """
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


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, left as it is: padding never depends on its pad token.

    Raises:
        UserError: the folder has no tokenizer.
    """
    load_config(path, trust_remote_code=trust_remote_code)
    return load_tokenizer_folder(path, trust_remote_code=trust_remote_code)


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
    """A causal LM in the section's precision, dropout off, in eval mode.

    Raises:
        UserError: no such model, or it is no causal LM, or weights are missing from the folder.
    """
    config = load_config(path, trust_remote_code=section.trust_remote_code)
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not config.is_decoder:  # transformers would load an encoder, which sees the answer
        raise UserError(
            f"{config.model_type} is an encoder, not a causal LM", where=path, fix="use a decoder-only model (Llama, Qwen, GPT-2, Gemma …)"
        )
    return _load(AutoModelForCausalLM, section, path)


def load_token_scorer(section: EngineSection, path: str, *, zero_head: bool) -> nn.Module:
    """A backbone of its own with a one-output head, as a sequence-classification model: it starts from a causal LM or from a reward model.

    Args:
        section: precision and attention kernel.
        path: Hugging Face folder.
        zero_head: start the head at zero, as NUMERICS §1 has it; otherwise the folder must hold a trained head.

    Raises:
        UserError: the architecture has no classification form, or a head is asked for that the folder does not hold.
    """
    model = _load(AutoModelForSequenceClassification, section, path, {"score.weight", "score.bias"} if zero_head else (), num_labels=1)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        fix = "use a decoder-only model (Llama, Qwen, Mistral, GPT-2, Gemma …) as value model"
        raise UserError("this architecture's classifier has no linear `score` head", where=path, fix=fix)
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
    ids = {*_ids(load_config(path, trust_remote_code=trust_remote_code)), *_ids(_generation_config(path))}
    if not ids and tokenizer.eos_token_id is not None:
        ids = {int(tokenizer.eos_token_id)}
    return tuple(sorted(ids))


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


def _load(kind: Any, section: EngineSection, path: str, fresh: Collection[str] = (), **options: Any) -> nn.Module:
    """fresh: weights that need not be in the folder, nor have the right shape there, because the caller sets them."""
    load_config(path, trust_remote_code=section.trust_remote_code)
    try:
        model, report = kind.from_pretrained(
            local(path),
            dtype=TORCH_DTYPES[section.dtype],
            attn_implementation=section.attention,
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # looked at below, where the message can name them
            **options,
        )
    except FAULTS as error:
        fix = "give a complete Hugging Face folder of the right kind, in safetensors"
        raise UserError(f"cannot load the model: {_reason(error)}", where=path, fix=fix) from error
    _refuse(path, "not in the folder", report["missing_keys"], fresh)
    _refuse(path, "of another shape than the configuration says", [name for name, *_ in report["mismatched_keys"]], fresh)
    switch_dropout_off(model)
    model.config.use_cache = False
    return model.eval()  # type: ignore[no-any-return]


def _refuse(path: str, what: str, names: Collection[str], fresh: Collection[str]) -> None:
    random = sorted(set(names) - set(fresh))
    if random:
        fix = "give a complete checkpoint of this architecture"
        raise UserError(f"{len(random)} weights are {what}, {random[0]} first; they would be random", where=path, fix=fix)


def _generation_config(path: str) -> Any:
    """None where the folder has no such file: it is optional."""
    try:
        return GenerationConfig.from_pretrained(local(path), local_files_only=True)
    except OSError as error:
        if (Path(local(path)) / "generation_config.json").is_file():
            fix = "mend or remove it: it may name tokens that end a completion"
            raise UserError(f"cannot read generation_config.json: {_reason(error)}", where=path, fix=fix) from error
        return None


def _ids(config: Any) -> list[int]:
    value = getattr(config, "eos_token_id", None)
    if value is None and hasattr(config, "get_text_config"):
        value = getattr(config.get_text_config(), "eos_token_id", None)
    return [] if value is None else [int(v) for v in (value if isinstance(value, list | tuple) else [value])]


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
