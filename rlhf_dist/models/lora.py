"""LoRA (peft; Hu et al. 2021, arXiv 2106.09685): adapters in, merged weights out; over 4-bit layers too (QLoRA)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf_dist.config.engines import LoraSection
from rlhf_dist.config.errors import UserError, first_line
from rlhf_dist.models.quantisation import dequantised, in_4_bits

NamedWeight = tuple[str, list[nn.Parameter], Callable[[], Tensor]]
"""A weight's Hugging Face name, the parameters it is made from, and what computes it once those are gathered (ZeRO 3)."""


def add_adapter(model: Any, section: LoraSection, seed: int, head: str | None = None) -> nn.Module:
    """Freezes the model and adds adapters that start as the identity (B = 0); the global random state is left as it was.

    Args:
        model: Hugging Face causal LM, or a sequence classifier.
        section: rank, scale, modules.
        seed: of the random matrices A, the same on all ranks.
        head: a classifier's head, `score`: it stays whole and is trained beside the adapters.

    Raises:
        UserError: no module of the model has one of the wanted names, or one that has it cannot be adapted; the embeddings are to be
            adapted and are tied, so that merging would change the head too, which was not trained so.
    """
    from peft import LoraConfig, get_peft_model  # most runs have no adapter, and it takes a second

    tied = tied_weight(model)
    targets: Any = section.target_modules if isinstance(section.target_modules, str) else list(section.target_modules)
    names = [name for name, _ in model.named_modules()]
    unknown = [] if isinstance(targets, str) else [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)]
    if unknown:
        raise _misfit(f"no module of the model is called {', '.join(unknown)}")
    alpha: Any = section.alpha  # peft declares an int and takes any number
    # With the task type SEQ_CLS peft would wrap the head in a copy of itself; what is saved names the type all the same.
    kind: dict[str, Any] = {"task_type": "CAUSAL_LM"} if head is None else {"exclude_modules": [head]}
    config = LoraConfig(r=section.r, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets, **kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
        except ValueError as error:
            raise _misfit(f"the adapter fits no module: {first_line(error)}") from error
    if any(_parts(module)[0] is tied for module in adapted.modules() if _is_adapted(module)):
        raise _misfit("the embeddings of this model are tied to its head: an adapter on one of them cannot be merged")
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:  # in the model's precision, as DeepSpeed keeps it: a copy beside the engine must hold what the engine sends
            parameter.data = parameter.data.to(model.dtype)
    if head is not None:
        model.get_submodule(head).requires_grad_(True)
    return adapted


def named_weights(model: nn.Module) -> Iterator[NamedWeight]:
    """Every weight of a model and every buffer that its checkpoint holds, adapters merged, 4-bit layers written out in the model's
    precision. A tied weight comes once."""
    done: set[int] = set()
    for name, module in model.named_modules():
        if _is_adapted(module):
            weight, adapters = _parts(module)
            done.add(id(weight))
            yield _plain(f"{name}.weight"), [weight, *adapters], _merge(module)
        elif in_4_bits(module) and id(module.weight) not in done:
            packed: Any = module.weight
            done.add(id(packed))
            yield _plain(f"{name}.weight"), [packed], _written_out(module)
    for name, parameter in model.named_parameters():
        if id(parameter) not in done and "lora_" not in name:
            yield _plain(name), [parameter], parameter.detach
    for name, buffer in model.state_dict(keep_vars=True).items():
        if not isinstance(buffer, nn.Parameter):
            yield _plain(name), [], buffer.detach


def trained_weights(model: nn.Module) -> Iterator[NamedWeight]:
    """The weights that are trained, under the model's own names: with LoRA the adapters alone, not merged."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, [parameter], parameter.detach


def low_rank_delta(a: Tensor, b: Tensor, scale: float, *, transposed: bool) -> Tensor:
    """What an adapter adds to a weight: scale · B A, in fp32.

    Args:
        a: [r, inputs]. b: [outputs, r]. transposed: the layer keeps its weight as [inputs, outputs].
    """
    product = b.float() @ a.float()
    delta: Tensor = (product.T if transposed else product) * scale
    return delta


def transposes(layer: Any) -> bool:
    """Whether a layer keeps its weight as [inputs, outputs]: GPT-2's do."""
    return isinstance(layer, Conv1D)


def tied_weight(model: Any) -> nn.Parameter | None:
    """The weight that embeddings and head share, None where they do not."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    return inputs.weight if outputs is not None and inputs.weight is outputs.weight else None


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict)  # as peft's LoraLayer


def _parts(layer: Any) -> tuple[nn.Parameter, list[nn.Parameter]]:
    return layer.get_base_layer().weight, [p for key, p in layer.named_parameters() if "lora_" in key]


def _merge(layer: Any) -> Callable[[], Tensor]:
    def merge() -> Tensor:
        base = layer.get_base_layer()
        delta = sum(_delta(layer, name) for name in layer.active_adapters)
        return (dequantised(base) + delta).to(_precision(base))  # rounded once

    return merge


def _written_out(layer: nn.Module) -> Callable[[], Tensor]:
    return lambda: dequantised(layer).to(_precision(layer))


def _precision(layer: Any) -> torch.dtype:
    return layer.compute_dtype if in_4_bits(layer) else layer.weight.dtype


def _delta(layer: Any, name: str) -> Tensor:
    """scaling · B A in fp32; peft's own comes rounded to the precision of the adapter."""
    if name in layer.lora_A:
        a, b, transposed = layer.lora_A[name].weight, layer.lora_B[name].weight, transposes(layer.get_base_layer())
    else:
        a, b, transposed = layer.lora_embedding_A[name], layer.lora_embedding_B[name], True
    if a.dim() > 2:  # a convolution
        return layer.get_delta_weight(name).detach().float()  # type: ignore[no-any-return]
    return low_rank_delta(a.detach(), b.detach(), layer.scaling[name], transposed=transposed)


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _misfit(what: str) -> UserError:
    return UserError(what, where="lora.target_modules", fix="name linear modules of the model, or use all-linear")
