"""Hugging Face models and tokenizers, loaded with every trap named: stop tokens from both configs, no pad token, no dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.errors import UserError

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_config(path: str, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration.

    Raises:
        UserError: neither a folder with a config.json nor a cached hub name.
    """
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not Path(path).expanduser().is_dir():
        raise UserError("there is no model folder of this name", where=path, fix="give a Hugging Face folder (config.json, safetensors, tokenizer)")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the model's configuration: {_first_line(error)}", where=path, fix="give a Hugging Face folder, or a hub name that is in the local cache") from None


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, left as it is: padding never depends on its pad token.

    Raises:
        UserError: the folder has no tokenizer.
    """
    load_config(path, trust_remote_code=trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot load a tokenizer: {_first_line(error)}", where=path, fix="save the tokenizer beside the model (tokenizer.json)") from None


def load_causal_lm(section: EngineSection, path: str) -> nn.Module:
    """A causal LM in the section's precision, dropout off, in eval mode.

    Raises:
        UserError: no such model, or it is no causal LM, or weights are missing from the folder.
    """
    return _load(AutoModelForCausalLM, section, path)


def load_token_scorer(section: EngineSection, path: str, *, zero_head: bool) -> nn.Module:
    """A backbone of its own with a one-output head, as a sequence-classification model: it starts from a causal LM or from a reward model.

    Args:
        zero_head: start the head at zero, as NUMERICS §1 has it; otherwise the folder must hold a trained head.

    Raises:
        UserError: the architecture has no classification form, or a head is asked for that the folder does not hold.
    """
    allowed = {"score.weight"} if zero_head else set()
    model = _load(AutoModelForSequenceClassification, section, path, allowed, num_labels=1)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise UserError("this architecture's classifier has no linear `score` head", where=path, fix="use a decoder-only model (Llama, Qwen, Mistral, GPT-2, Gemma …) as value model")
    if zero_head:
        nn.init.zeros_(head.weight)
        if head.bias is not None:
            nn.init.zeros_(head.bias)
    return model


def stop_tokens(path: str, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False) -> tuple[int, ...]:
    """All ids that end a completion: from generation_config.json and config.json; the tokenizer's eos where both are silent."""
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
    """Sets every dropout probability to 0, so that training mode (needed by gradient checkpointing) samples nothing."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout", "hidden_dropout", "resid_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _load(kind: Any, section: EngineSection, path: str, allowed_missing: set[str] | None = None, **options: Any) -> nn.Module:
    load_config(path, trust_remote_code=section.trust_remote_code)
    try:
        model, report = kind.from_pretrained(
            path,
            dtype=TORCH_DTYPES[section.dtype],
            attn_implementation=section.attention,
            trust_remote_code=section.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"cannot load the model: {_first_line(error)}", where=path, fix="give a complete Hugging Face folder of the right kind") from None
    missing = sorted(set(report["missing_keys"]) - (allowed_missing or set()))
    if missing:
        raise UserError(f"{len(missing)} weights are not in the folder, {missing[0]} first; they would be random", where=path, fix="give a complete checkpoint of this architecture")
    switch_dropout_off(model)
    model.config.use_cache = False
    return model.eval()


def _generation_config(path: str) -> Any:
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return None  # the file is optional


def _ids(config: Any) -> list[int]:
    value = getattr(config, "eos_token_id", None)
    if value is None and hasattr(config, "get_text_config"):
        value = getattr(config.get_text_config(), "eos_token_id", None)
    return [] if value is None else [int(v) for v in (value if isinstance(value, list | tuple) else [value])]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
