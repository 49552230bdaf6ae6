"""Several sequences in one row of a forward, none of which sees another.

Padding makes every row as wide as the longest; packing fills the rest of a row with further sequences. Positions start at 0 for each
sequence, and no attention mask is passed: from the positions transformers builds the block-diagonal causal mask (sdpa, eager), or tells
flash attention where sequences begin, which there works for a single row only.

Example, sequences of 4, 3 and 1 tokens, of which the last two share a row::

    input_ids     [[1 2 3 4], [5 6 7 8]]
    position_ids  [[0 1 2 3], [0 1 2 0]]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.models.head import gather_on_gpu
from rlhf_dist.models.inputs import numbered, to_device

ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far apart, as a share of the largest, log-probs of one sequence may lie in two grids; wrong positions move them by more."""
HEAD_ROUNDING = {torch.float32: 5e-3, torch.bfloat16: 0.25, torch.float16: 5e-2}
"""The same of a few projections of hidden states, the largest of which may be small; wrong positions or places move them altogether."""
NAMES = {"logprobs_BT": "log-probs", "values_BT": "values", "score_B": "scores"}


def packed_rows(tokens_BS: Tensor, mask_BS: Tensor, step: int = 1, *, one_row: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """Rows that hold several sequences: longest first, each in the first row that has room for it.

    Args:
        tokens_BS: int64, one sequence a row. mask_BS: bool, the tokens that exist; what stands in other slots never gets in.
        step: the width, that of the longest sequence, is rounded up to a multiple of this.
        one_row: put all sequences in one row, as flash attention wants them.

    Returns:
        input_ids and position_ids, int64 [R, W]. A slot left over is id 0 at position 0: a sequence of its own.
        slots_BS int64: of every token its slot in the flattened grid; -1 where there is none.
    """
    lengths = mask_BS.sum(1).tolist()
    width = -(-(sum(lengths) if one_row else max(lengths)) // step) * step
    starts, rows = first_fit(lengths, width)
    positions_BS = mask_BS.long().cumsum(1) - 1
    slots_BS = torch.where(mask_BS, torch.tensor(starts)[:, None] + positions_BS, -1)
    grids = torch.zeros(2, rows * width, dtype=torch.long)
    grids[:, slots_BS[mask_BS]] = torch.stack([tokens_BS[mask_BS], positions_BS[mask_BS]])
    ids_RW, positions_RW = grids.view(2, rows, width)
    return {"input_ids": ids_RW, "position_ids": positions_RW}, slots_BS


def packed_inputs(batch: SequenceBatch, step: int = 1, *, one_row: bool = False) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Packed rows of a batch, and where its response tokens stand.

    Args:
        batch: padded anyhow. step, one_row: see `packed_rows`.

    Returns:
        input_ids and position_ids, int64 [R, W].
        slots_N int64: of every response token its slot in the flattened grid, in the order of the batch.
        places_BT int64: of each response token its number in slots_N; N for padded slots.

    Raises:
        ValueError: a response without a prompt token before it: nothing of its own would predict its first token.
    """
    tokens, slots_BS = packed_rows(*_joined(batch), step, one_row=one_row)
    responds_BT = batch.response_attention_BT.bool()
    slots_N = slots_BS[:, batch.prompt_tokens_BP.shape[1] :][responds_BT]
    places_BT = numbered(responds_BT)
    return tokens, slots_N, places_BT


def packed_states(batch: SequenceBatch, step: int = 1, *, one_row: bool = False) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Packed rows of a batch, and where the states stand in which a value is read.

    Args:
        batch: padded anyhow. step, one_row: see `packed_rows`.

    Returns:
        input_ids and position_ids, int64 [R, W].
        before_BT int64: of each response token the slot before it in the flattened grid; some slot for padded ones.
        last_B int64: the slot of each sequence's last token.

    Raises:
        ValueError: a response without a prompt token before it: the state before its first token would be another sequence's.
    """
    tokens, slots_BS = packed_rows(*_joined(batch), step, one_row=one_row)
    return tokens, (slots_BS[:, batch.prompt_tokens_BP.shape[1] :] - 1).clamp(min=0), slots_BS.amax(1)


def _joined(batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    """Prompts and responses side by side: tokens and mask, [B, P + T]."""
    if bool((batch.response_attention_BT.bool().any(1) & ~batch.prompt_mask_BP.bool().any(1)).any()):
        raise ValueError("a response without a prompt token before it cannot be packed")
    mask_BS = torch.cat([batch.prompt_mask_BP, batch.response_attention_BT], dim=1).bool()
    return torch.cat([batch.prompt_tokens_BP, batch.response_tokens_BT], dim=1), mask_BS


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


@contextmanager
def lively_head(head: nn.Module, outputs: int = 1) -> Iterator[None]:
    """Within it a head answers with fixed projections of its input: a value head that starts at zero would tell of no leak.

    Args:
        head: a layer on hidden states [..., D]. outputs: how many numbers it gives, [..., outputs].
    """

    def project(_: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> Tensor:
        hidden = given[0]
        waves = torch.arange(hidden.shape[-1] * outputs, dtype=torch.float32, device=hidden.device).cos() * (2 / hidden.shape[-1]) ** 0.5
        return hidden @ waves.view(-1, outputs).to(hidden.dtype)

    handle = head.register_forward_hook(project)
    try:
        yield
    finally:
        handle.remove()


def refuse_leaks(module: Any, inputs: Callable[[], dict[str, Any]], name: str, rounding: Mapping[torch.dtype, float] = ROUNDING) -> None:
    """Tries packing on three short sequences, two of which share a row (`three_sequences`).

    No gradient may flow from a sequence to its neighbour, which is exactly 0 where nothing is seen (its bits may change all the same:
    experts of a mixture compute in groups of another size), and the numbers must be those of the padded batch.

    Args:
        module: a module that packs, not yet wrapped by DeepSpeed; it is made to pad once.
        inputs: of its forward, packed or not as `module.packing` says.
        name: of the output to look at, with one row a sequence.
        rounding: how far apart its numbers may lie, as a share of the largest.

    Raises:
        UserError: sequences in one row see each other in this architecture, or the numbers differ.
    """
    model = module.model
    gather_on_gpu(model)
    device = next(model.parameters()).device
    module.packing = False
    with torch.no_grad():
        apart = module(**to_device(inputs(), device))[name]
    module.packing = True
    packed = to_device(inputs(), device)
    with _watched_embeddings(model) as watched:
        together = module(**packed)[name]
    valid = three_sequences().response_attention_BT.to(device) if name.endswith("_BT") else torch.ones_like(apart, dtype=torch.bool)
    (gradient_RWD,) = torch.autograd.grad(together[2][valid[2]].sum(), watched)
    ids_RW = packed["tokens"]["input_ids"]
    gap, scale = (float(values[valid].abs().max()) for values in ((together - apart).detach(), apart))
    if bool(gradient_RWD[(ids_RW == 3) | (ids_RW == 4)].any()):
        raise refusal(model, "sequences in one row see each other in this architecture")
    if not gap <= rounding[next(model.parameters()).dtype] * scale:
        raise refusal(model, f"its {NAMES[name]} are {gap:.2g} off in packed rows")


def three_sequences() -> SequenceBatch:
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


def refusal(model: Any, reason: str) -> UserError:
    """That a model cannot be packed, and why."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return UserError(f"{type(base).__name__} cannot be packed: {reason}", where=str(base.config.name_or_path), fix="set packing: false")
