"""LoRA on the policy (peft; Hu et al. 2021, arXiv 2106.09685): adapters in, merged weights out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rlhf_dist.config.engines import LoraSection
from rlhf_dist.config.errors import UserError

NamedWeight = tuple[str, list[nn.Parameter], Callable[[], Tensor]]
"""A weight's Hugging Face name, the parameters it is made from, and what computes it once those are gathered (ZeRO 3)."""


def add_adapter(model: nn.Module, section: LoraSection, seed: int) -> nn.Module:
    """Freezes the model and adds adapters that start as the identity (B = 0); the global random state is left as it was.

    Args:
        model: Hugging Face causal LM.
        section: rank, scale, modules.
        seed: of the random matrices A, the same on all ranks.

    Raises:
        UserError: no module of the model has one of the wanted names, or one that has it cannot be adapted; the embeddings are to be
            adapted and are tied, so that merging would change the head too, which was not trained so.
    """
    tied = _tied_weight(model)
    targets: Any = section.target_modules if isinstance(section.target_modules, str) else list(section.target_modules)
    names = [name for name, _ in model.named_modules()]
    unknown = [] if isinstance(targets, str) else [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)]
    if unknown:
        raise _misfit(f"no module of the model is called {', '.join(unknown)}")
    alpha: Any = section.alpha  # peft declares an int and takes any number
    config = LoraConfig(r=section.r, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            # In the model's own precision, as DeepSpeed keeps them: a copy beside the engine must hold what the engine sends.
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False).eval()  # type: ignore[arg-type]
        except ValueError as error:
            raise _misfit(f"the adapter fits no module: {str(error).splitlines()[0]}") from error
    if any(_parts(module)[0] is tied for module in adapted.modules() if isinstance(module, LoraLayer)):
        raise _misfit("the embeddings of this model are tied to its head: an adapter on one of them cannot be merged")
    return adapted


def named_weights(model: nn.Module) -> Iterator[NamedWeight]:
    """Every weight of a model and every buffer that its checkpoint holds, adapters merged. A tied weight comes once."""
    merged: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            weight, adapters = _parts(module)
            merged.add(id(weight))
            yield _plain(f"{name}.weight"), [weight, *adapters], _merge(module)
    for name, parameter in model.named_parameters():
        if id(parameter) not in merged and "lora_" not in name:
            yield _plain(name), [parameter], parameter.detach
    for name, buffer in model.state_dict(keep_vars=True).items():
        if not isinstance(buffer, nn.Parameter):
            yield _plain(name), [], buffer.detach


def trained_weights(model: nn.Module) -> Iterator[NamedWeight]:
    """The weights that are trained, under the model's own names: with LoRA the adapters alone, not merged."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, [parameter], parameter.detach


def _tied_weight(model: Any) -> nn.Parameter | None:
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    return inputs.weight if outputs is not None and inputs.weight is outputs.weight else None


def _parts(layer: Any) -> tuple[nn.Parameter, list[nn.Parameter]]:
    return layer.get_base_layer().weight, [p for key, p in layer.named_parameters() if "lora_" in key]


def _merge(layer: Any) -> Callable[[], Tensor]:
    def merge() -> Tensor:
        weight: Tensor = layer.get_base_layer().weight.detach()
        delta = sum(_delta(layer, name) for name in layer.active_adapters)
        return (weight.float() + delta).to(weight.dtype)  # rounded once

    return merge


def _delta(layer: Any, name: str) -> Tensor:
    """scaling · B A in fp32; peft's own comes rounded to the precision of the adapter."""
    if name in layer.lora_A:
        a, b, transposed = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.fan_in_fan_out
    else:
        a, b, transposed = layer.lora_embedding_A[name], layer.lora_embedding_B[name], True
    if a.dim() > 2:  # a convolution
        return layer.get_delta_weight(name).detach().float()  # type: ignore[no-any-return]
    product = b.detach().float() @ a.detach().float()
    delta: Tensor = (product.T if transposed else product) * layer.scaling[name]
    return delta


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _misfit(what: str) -> UserError:
    return UserError(what, where="policy.lora.target_modules", fix="name linear modules of the model, or use all-linear")
