"""The model seen as rows in slots: admit prompts, decode one token for every row, drop rows that are done.

Every row starts at position 0. A prompt's last token is not part of its prefill: it is the input of the row's first decode step. So all
logits that are ever sampled from come from decode steps, and prefill computes none that matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.models.flops import number_of
from rlhf_dist.rollout.attention import SLOT_ATTENTION
from rlhf_dist.rollout.forward import Forward, PlainForward
from rlhf_dist.rollout.graphs import Bucket, Grid, StepGraphs
from rlhf_dist.rollout.kv_cache import DecodePlan, PrefillPlan, SlotCache
from rlhf_dist.rollout.prefill import SPAN_STEP, Piece, pieces, round_up
from rlhf_dist.rollout.traits import FULL, SLIDING, ModelTraits

ROW_STEP = 4
"""A step computes a multiple of this many rows, idle ones if need be. On one CPU thread a row's result is then the same to the last bit
whatever the number of rows (several threads may still split a product differently): a single row would take other matrix kernels, and an
odd number of elements ends in scalar code that rounds differently."""
LEAST_SPAN = 64
"""Positions of the smallest bucket: below, a graph of its own would save nothing."""
SMALL_PRODUCT = 512
"""Positions times head width of the smallest span: below 400 multiplications PyTorch computes batched products by another kernel."""


class SlotDecoder:
    """Rows 0 to `count`-1 of a model's slot cache. Call inside `traits.decoding`.

    Args:
        model: a causal LM, in eval mode.
        traits: its facts.
        slots: most rows at once.
        max_len: longest row, prompt and completion together.
        forward: how to run the model; by default as it is.
        graphs: runs steps in buckets; without it a step is of just the rows and positions it needs.
    """

    def __init__(
        self,
        model: nn.Module,
        traits: ModelTraits,
        slots: int,
        max_len: int,
        *,
        forward: Forward | None = None,
        graphs: StepGraphs | None = None,
    ) -> None:
        self._graphs = graphs
        self._forward, self._traits = forward or PlainForward(model), traits
        self.device = next(model.parameters()).device
        slots = round_up(slots, ROW_STEP)
        self._smallest_span = round_up(-(-SMALL_PRODUCT // _head_width(model)), SPAN_STEP)
        self._longest, self._max_len = max_len, max(round_up(max_len, SPAN_STEP), self._smallest_span)
        self._kernel, self._dtype = _kernel(model), next(model.parameters()).dtype
        # One slot more than rows: it holds the prefix that `admit` was asked to keep.
        self._cache, self._spare = SlotCache(slots + 1, self._max_len, self._kernel == SLOT_ATTENTION), slots
        self._kept: tuple[int, ...] = ()
        self._lengths: list[int] = []
        # One column a slot: the token to feed, the positions stored, and a running index that the caller gives a meaning.
        self._state_3S = torch.zeros(3, slots, dtype=torch.long, device=self.device)
        self._slots_S = torch.arange(slots, device=self.device)
        self._positions_L = torch.arange(self._max_len, device=self.device)
        self._grid = Grid(Bucket(ROW_STEP, max(self._smallest_span, LEAST_SPAN)), Bucket(slots, self._max_len))

    @property
    def count(self) -> int:
        """Rows in use."""
        return len(self._lengths)

    @property
    def indices_N(self) -> Tensor:
        """Each row's running index, int64 [count]: as given to `admit`, plus one for every token fed since."""
        return self._state_3S[2, : self.count]

    def admit(self, prompts: Sequence[tuple[int, ...]], indices: Sequence[int], *, keep_last: bool = False) -> None:
        """Takes prompts (each at least one token) into the next slots, in order. Equal prompts are computed once.

        `keep_last`: the next call begins with the prompt that this one ends with, and need not compute it again.
        """
        first = self.count
        columns = [[prompt[-1], len(prompt) - 1, index] for prompt, index in zip(prompts, indices, strict=True)]
        self._state_3S[:, first : first + len(prompts)] = torch.tensor(columns, device=self.device).T
        held = {self._kept: self._spare} if self._kept else {}
        fresh, copies = [], []
        for slot, prompt in enumerate(prompts, first):
            prefix = prompt[:-1]
            if prefix in held:
                copies.append((held[prefix], slot, len(prefix)))
            elif prefix:
                held[prefix] = slot
                fresh.append((slot, prefix))
        for piece in pieces([len(prefix) for _, prefix in fresh], exact=self.device.type == "cpu"):
            self._prefill([fresh[row] for row in piece.rows], piece)
        if copies:
            sources, targets, lengths = zip(*copies, strict=True)
            self._cache.copy(self._tensor(sources), self._tensor(targets), max(lengths))
        self._lengths += [len(prompt) - 1 for prompt in prompts]
        if keep_last and prompts[-1][:-1] != self._kept:
            self._kept = prompts[-1][:-1]
            self._cache.copy(self.count - 1, self._spare, len(self._kept))

    def step(self) -> Tensor:
        """Feeds every row's token; returns the logits of the next one, [count, V] in the model's dtype. A later step may overwrite them."""
        span = max(self._lengths) + 1
        if self._graphs is None:
            shape = Bucket(round_up(self.count, ROW_STEP), max(round_up(span, SPAN_STEP), self._smallest_span))
            return self._decode(shape, self.count)[: self.count]
        bucket = self._grid.bucket(self.count, span)
        # Idle rows store theirs too: at position 0 of slots that nobody holds.
        return self._graphs.run(bucket, lambda: self._decode(bucket, bucket.rows))[: self.count]

    def feed(self, tokens_N: Tensor) -> None:
        """Sets the tokens that the next step takes in, int64 [count]."""
        rows = self.count
        self._state_3S[0, :rows] = tokens_N
        self._state_3S[1:, :rows] += 1
        self._lengths = [length + 1 for length in self._lengths]

    def drop(self, row: int) -> None:
        """Frees a row; the last row moves into its slot, so callers keep their lists by `rows[row] = rows[-1]; rows.pop()`."""
        last = self.count - 1
        if row != last:
            self._cache.copy(last, row, self._lengths[last])
            self._state_3S[:, row] = self._state_3S[:, last]
            self._lengths[row] = self._lengths[last]
        self._state_3S[:, last] = 0
        self._lengths.pop()

    def _decode(self, shape: Bucket, stored: int) -> Tensor:
        """A step of given shape; the first `stored` rows keep their keys and values."""
        tokens_N, lengths_N = self._state_3S[0, : shape.rows], self._state_3S[1, : shape.rows]
        self._cache.plan = DecodePlan(shape.rows, shape.span, self._slots_S[:stored], lengths_N[:stored])
        mask = self._masks(lengths_N, shape.span, decode=True)
        return self._forward(tokens_N[:, None], lengths_N[:, None], mask, self._cache, logits=True)

    def _prefill(self, rows: Sequence[tuple[int, tuple[int, ...]]], piece: Piece) -> None:
        """One piece of the prefixes of some slots. Right-padded: under a causal mask no real token sees the pads behind it."""
        end = piece.start + piece.width
        parts = [prefix[piece.start : end] for _, prefix in rows]
        padded_BQ = self._tensor([part + (0,) * (piece.width - len(part)) for part in parts])
        self._cache.plan = PrefillPlan(self._tensor([slot for slot, _ in rows]), piece.start)
        # Padding may reach past the end of a table of positions.
        positions_Q = self._positions_L[piece.start : end].clamp(max=self._longest - 1)
        # The first piece sees only itself, which needs no mask of ours unless a window is narrower.
        plain = piece.start == 0 and (self._traits.window is None or end <= self._traits.window)
        mask = None if plain else self._masks(self._positions_L[piece.start : end], end, decode=False)
        self._forward(padded_BQ, positions_Q.expand(len(rows), -1), mask, self._cache, logits=False)

    def _masks(self, queries_Q: Tensor, span: int, decode: bool) -> Any:
        """Which of `span` positions the queries at given positions may see; a dict by kind where layers differ.

        Decode: [n, 1, 1, span], one query a row. Otherwise [1, 1, q, span], the queries of one piece of every row.
        """
        positions_L, queries_Q1 = self._positions_L[:span], queries_Q[:, None]
        seen_QL, window = positions_L <= queries_Q1, self._traits.window
        if window is None or span <= window:
            return self._as_mask(seen_QL, decode)
        sliding = self._as_mask(seen_QL & (positions_L > queries_Q1 - window), decode)
        return {FULL: self._as_mask(seen_QL, decode), SLIDING: sliding} if FULL in self._traits.kinds else sliding

    def _as_mask(self, seen_QL: Tensor, decode: bool) -> Tensor:
        """sdpa takes True for "may attend"; the eager kernel adds its mask to the scores, and so does ours in a decode step."""
        mask = seen_QL[:, None, None, :] if decode else seen_QL[None, None]
        ours = decode and self._kernel == SLOT_ATTENTION
        if not ours and self._kernel != "eager":
            return mask
        dtype = torch.float32 if ours else self._dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)

    def _tensor(self, numbers: Sequence[Any]) -> Tensor:
        return torch.tensor(numbers, device=self.device)


def _kernel(model: nn.Module) -> str:
    config: Any = model.config
    return str(config.get_text_config()._attn_implementation)


def _head_width(model: nn.Module) -> int:
    config: Any = model.config
    text = config.get_text_config()
    return number_of(text, "head_dim") or int(text.hidden_size // text.num_attention_heads)
