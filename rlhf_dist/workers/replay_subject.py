"""What `workers.replay` must know of a model in training: how it is built again, what it was trained on, which numbers its loss reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rlhf_dist.config.engines import Dtype, TrainedSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.engine import Objective, Outputs
from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.runs.capsule import MODEL, TRAINED, Capsule
from rlhf_dist.workers.weight_sync import trained_weights_of


@dataclass(frozen=True)
class Look:
    """A row by itself.

    name: which it is. tokens: that are trained on. fault: the first number that is not finite, in words; empty: all are. texts: by what
    they are. batch, outputs: what the objective takes, of this row alone.
    """

    name: str
    tokens: int
    fault: str
    texts: dict[str, str]
    batch: Any
    outputs: Outputs


class Subject(Protocol):
    """A model as it was when its step was skipped. dtype: its precision. module: with the weights of the capsule. objective: its loss."""

    dtype: Dtype
    module: Any
    objective: Objective

    def rows(self, rank: int) -> Any:
        """The rows of a rank.

        Raises:
            UserError: they are missing or damaged.
        """
        ...

    def batch(self, rows: Any, places: Sequence[int]) -> Any:
        """A microbatch of them."""
        ...

    def looks(self, rows: Any, places: Sequence[int], outputs: Outputs) -> Iterator[Look]:
        """The microbatch row by row, with the module's outputs for it."""
        ...


def rebuilt(capsule: Capsule, section: TrainedSection, build: Callable[[Any], Any]) -> Any:
    """A module with the weights of a capsule.

    Args:
        capsule: of the model.
        section: of the model, in the run.
        build: makes the module of such a section.

    Raises:
        UserError: the weights cannot be read; of adapters: the base model is not there, or is another.
    """
    if section.lora is None:
        return build(section.model_copy(update={"model": str(capsule.folder / MODEL)}))
    module = build(section)
    _take(trained_weights_of(module.model), capsule)
    return module


def alone(outputs: Outputs, rows: Sequence[int], batch: Any) -> Outputs:
    """The outputs of some rows of a microbatch, as narrow as a batch of these rows alone."""
    width = batch.response_tokens_BT.shape[1] if isinstance(batch, SequenceBatch) else None
    return {name: each[list(rows)][:, :width] if name.endswith("_BT") else each[list(rows)] for name, each in outputs.items()}


def token_fault(name: str, values_BT: Tensor | None, batch: SequenceBatch, row: int = 0, of: str = "") -> str:
    """The first trained token at which a number is not finite, in words; empty where all are.

    Args:
        name: of the number. values_BT: None where there is none. batch, row: whose tokens they are. of: which text, in words.
    """
    if values_BT is None:
        return ""
    wrong = (~values_BT[row].isfinite() & batch.response_mask_BT[row]).nonzero().flatten().tolist()
    if not wrong:
        return ""
    token, value = int(batch.response_tokens_BT[row, wrong[0]]), float(values_BT[row, wrong[0]])
    more = f", and at {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"{name} is {value} at response token {wrong[0] + 1}{of} (id {token}){more}"


@torch.no_grad()
def _take(held: Mapping[str, Tensor], capsule: Capsule) -> None:
    try:
        saved = load_file(capsule.folder / TRAINED)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{TRAINED} cannot be read: {type(error).__name__}", where=str(capsule.folder), fix="use another capsule") from None
    if {name: weight.shape for name, weight in held.items()} != {name: weight.shape for name, weight in saved.items()}:
        fix = "put the base model back as it was when the run began"
        raise UserError("the trained weights do not fit the base model", where=str(capsule.folder), fix=fix)
    for name, weight in held.items():
        weight.copy_(saved[name])
