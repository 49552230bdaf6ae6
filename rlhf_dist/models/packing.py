"""Several sequences in one row of a forward, none of which sees another.

Padding makes every row as wide as the longest; packing fills the rest of a row with further sequences. Positions start at 0 for each
sequence, and no attention mask is passed: from the positions transformers builds the block-diagonal causal mask (sdpa, eager), or tells
flash attention where sequences begin, which there works for a single row only.

Example, sequences of 4, 3 and 1 tokens, of which the last two share a row::

    input_ids     [[1 2 3 4], [5 6 7 8]]
    position_ids  [[0 1 2 3], [0 1 2 0]]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.models.head import gather_on_gpu
from rlhf_dist.models.inputs import model_inputs, width_step

ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far apart, as a share of the largest, log-probs of one sequence may lie in two grids; wrong positions move them by more."""


def packed_inputs(batch: SequenceBatch, step: int = 1, *, one_row: bool = False) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Inputs of a forward whose rows hold several sequences: longest first, each in the first row that has room for it.

    Args:
        batch: padded anyhow; what stands in padded slots never gets in.
        step: the width, that of the longest sequence, is rounded up to a multiple of this.
        one_row: put all sequences in one row, as flash attention wants them.

    Returns:
        input_ids and position_ids, int64 [R, W]. A slot left over is id 0 at position 0: a sequence of its own.
        slots_N int64: of every response token its slot in the flattened grid, in the order of the batch.
        places_BT int64: of each response token its number in slots_N; N for padded slots.

    Raises:
        ValueError: a response without a prompt token before it: nothing of its own would predict its first token.
    """
    attention_BS = torch.cat([batch.prompt_mask_BP, batch.response_attention_BT], dim=1).bool()
    tokens_BS = torch.cat([batch.prompt_tokens_BP, batch.response_tokens_BT], dim=1)
    lengths = attention_BS.sum(1).tolist()
    width = -(-(sum(lengths) if one_row else max(lengths)) // step) * step
    starts, rows = first_fit(lengths, width)
    positions_BS = attention_BS.long().cumsum(1) - 1
    slots_BS = torch.tensor(starts)[:, None] + positions_BS
    grids = torch.zeros(2, rows * width, dtype=torch.long)
    grids[:, slots_BS[attention_BS]] = torch.stack([tokens_BS[attention_BS], positions_BS[attention_BS]])
    responds_BT, first = batch.response_attention_BT.bool(), batch.prompt_tokens_BP.shape[1]
    slots_N = slots_BS[:, first:][responds_BT]
    if bool((positions_BS[:, first:][responds_BT] == 0).any()):
        raise ValueError("a response without a prompt token before it cannot be packed")
    places_BT = torch.where(responds_BT, responds_BT.flatten().cumsum(0).view_as(responds_BT) - 1, len(slots_N))
    ids_RW, positions_RW = grids.view(2, rows, width)
    return {"input_ids": ids_RW, "position_ids": positions_RW}, slots_N, places_BT


def first_fit(lengths: Sequence[int], width: int) -> tuple[list[int], int]:
    """First-fit decreasing (at most 11/9 of the fewest rows, and one more): where in the flattened grid each sequence starts, and the rows.

    Args:
        lengths: tokens of each sequence, none longer than a row. width: of a row.
    """
    free: list[int] = []
    starts = [0] * len(lengths)
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        row = next((row for row, left in enumerate(free) if left >= lengths[number]), len(free))
        if row == len(free):
            free.append(width)
        starts[number] = (row + 1) * width - free[row]
        free[row] -= lengths[number]
    return starts, len(free)


def wants_one_row(model: Any) -> bool:
    """Whether the model's attention kernel tells sequences apart in a single row only."""
    return "flash" in model.config._attn_implementation


@contextmanager
def head_at(model: Any, slots_N: Tensor) -> Iterator[None]:
    """Within it the model's head sees the hidden states of these slots of the flattened grid alone: logits are [1, N, V].

    `logits_to_keep` of transformers takes the same columns of every row, which in packed rows are nearly all of them.
    """

    def select(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (given[0].flatten(0, 1).index_select(0, slots_N).unsqueeze(0),)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def refuse_leaks(module: Any) -> None:
    """Tries packing on three short sequences, two of which share a row.

    No gradient may flow from a sequence to its neighbour, which is exactly 0 where nothing is seen (its bits may change all the same:
    experts of a mixture compute in groups of another size), and the log-probs must be those of the padded batch.

    Args:
        module: a `PolicyModule` that packs, not yet wrapped by DeepSpeed.

    Raises:
        UserError: sequences in one row see each other in this architecture, or the log-probs differ.
    """
    model, batch = module.model, _three_sequences()
    gather_on_gpu(model)
    if wants_one_row(model):
        model.to("cuda")  # its kernels run nowhere else
    device, step = next(model.parameters()).device, width_step(model)
    tokens, places_BT = model_inputs(batch, step)
    with torch.no_grad():
        apart_BT = module(**_on(device, {"tokens": tokens, "places_BT": places_BT}))["logprobs_BT"]
    inputs = _on(device, module.inputs(batch))
    with _watched_embeddings(model) as watched:
        together_BT = module(**inputs)["logprobs_BT"]
    (gradient_RWD,) = torch.autograd.grad(together_BT[2].sum(), watched)
    neighbour_RW = (inputs["tokens"]["input_ids"] == 3) | (inputs["tokens"]["input_ids"] == 4)
    valid_BT = batch.response_attention_BT.to(device)
    gap, scale = (float(values[valid_BT].abs().max()) for values in ((together_BT - apart_BT).detach(), apart_BT))
    if bool(gradient_RWD[neighbour_RW].any()):
        raise _refusal(model, "sequences in one row see each other in this architecture")
    if not gap <= ROUNDING[next(model.parameters()).dtype] * scale:
        raise _refusal(model, f"its log-probs are {gap:.2g} off in packed rows")


def _three_sequences() -> SequenceBatch:
    """Of 7, 4 and 3 tokens; the first speaks in ids 1 and 2, the second in 3 and 4, the third in 5 and 6. The last two share a row."""
    prompt_BP = torch.tensor([[1, 2], [3, 4], [5, 6]])
    response_BT = torch.tensor([[1, 1, 2, 2, 1], [3, 4, 0, 0, 0], [6, 0, 0, 0, 0]])
    return SequenceBatch(prompt_BP, torch.ones_like(prompt_BP, dtype=torch.bool), response_BT, response_BT > 0, response_BT > 0)


@contextmanager
def _watched_embeddings(model: Any) -> Iterator[list[Tensor]]:
    """Collects what the embedding layer gives, as leaves that take gradients whatever is trained."""
    watched: list[Tensor] = []

    def watch(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        watched.append(output.detach().requires_grad_())
        return watched[-1].clone()  # some models write into it

    handle = model.get_input_embeddings().register_forward_hook(watch)
    try:
        yield watched
    finally:
        handle.remove()


def _on(device: torch.device, value: Any) -> Any:
    return {key: _on(device, inner) for key, inner in value.items()} if isinstance(value, dict) else value.to(device)


def _refusal(model: Any, reason: str) -> UserError:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return UserError(f"{type(base).__name__} cannot be packed: {reason}", where=str(base.config.name_or_path), fix="set packing: false")
