"""LoRA on the policy (peft): adapters in, merged weights out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rlhf_dist.config.engines import LoraSection
from rlhf_dist.config.errors import UserError

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


def add_adapter(model: nn.Module, section: LoraSection, seed: int) -> nn.Module:
    """Freezes the model and adds adapters that start as the identity (B = 0).

    Raises:
        UserError: no module of the model has one of the wanted names.
    """
    targets: Any = section.target_modules if isinstance(section.target_modules, str) else list(section.target_modules)
    config = LoraConfig(r=section.r, lora_alpha=section.alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config).eval()
        except ValueError as error:
            fix = "name linear modules of the model, or use all-linear"
            raise UserError(f"the adapter fits no module: {str(error).splitlines()[0]}", where="policy.lora.target_modules", fix=fix) from None


def has_adapter(model: nn.Module) -> bool:
    """Whether the model is wrapped by peft."""
    return isinstance(model, PeftModel)


def named_weights(model: nn.Module) -> Iterator[tuple[str, list[nn.Parameter], Callable[[], Tensor]]]:
    """Every weight of a model under its Hugging Face name, adapters merged.

    Yields:
        name, the parameters it is made from, and a function that computes it once those are gathered (ZeRO 3).
    """
    merged: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            merged.add(id(weight))
            adapters = [p for key, p in module.named_parameters() if "lora_" in key]
            yield _plain(f"{name}.weight"), [weight, *adapters], _merge(module)
    for name, parameter in model.named_parameters():
        if id(parameter) not in merged and "lora_" not in name:
            yield _plain(name), [parameter], parameter.detach


def _merge(module: Any) -> Callable[[], Tensor]:
    def merge() -> Tensor:
        weight = module.get_base_layer().weight.detach()
        return weight + sum(module.get_delta_weight(name).detach().to(weight.dtype) for name in module.active_adapters)

    return merge


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
