"""The model seen as rows in slots: admit prompts, decode one token for every row, drop rows that are done.

Every row starts at position 0. A prompt's last token is not part of its prefill: it is the input of the row's first decode step. So all
logits that are ever sampled from come from decode steps, and prefill computes none that matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_dist.rollout.kv_cache import DecodePlan, PrefillPlan, SlotCache
from rlhf_dist.rollout.traits import FULL, SLIDING, ModelTraits

PREFILL_TOKENS = 8192
"""Padded tokens in one prefill forward: bounds the memory of its activations."""
SPAN_STEP = 16
"""Attention spans are rounded up to a multiple of this. A row's result is then the same to the last bit whatever the other rows' lengths
are (masked positions fill whole vector registers with zeros), and GPU kernels get the aligned masks they want."""
ROW_STEP = 8
"""A step computes a multiple of this many rows, idle ones if need be. On one CPU thread a row's result is then the same to the last bit
whatever the number of rows (several threads may still split a product differently): very few rows would take other matrix kernels, and an
odd number of elements ends in scalar code that rounds differently."""


class SlotDecoder:
    """Rows 0 to `count`-1 of a model's slot cache. Call inside `traits.decoding`.

    Args:
        model: a causal LM, in eval mode.
        traits: its facts.
        slots: most rows at once.
        max_len: longest row, prompt and completion together.
    """

    def __init__(self, model: nn.Module, traits: ModelTraits, slots: int, max_len: int) -> None:
        self._model, self._traits = model, traits
        self.device = next(model.parameters()).device
        slots = _round_up(slots, ROW_STEP)
        self._longest, self._max_len = max_len, _round_up(max_len, SPAN_STEP)
        self._cache = SlotCache(slots, self._max_len)
        self._additive = _adds_its_mask(model)
        self._lengths: list[int] = []
        # One column a slot: the token to feed, the positions stored, and a running index that the caller gives a meaning.
        self._state_3S = torch.zeros(3, slots, dtype=torch.long, device=self.device)
        self._slots_S = torch.arange(slots, device=self.device)
        self._positions_L = torch.arange(self._max_len, device=self.device)

    @property
    def count(self) -> int:
        """Rows in use."""
        return len(self._lengths)

    @property
    def indices_N(self) -> Tensor:
        """Each row's running index, int64 [count]: as given to `admit`, plus one for every token fed since."""
        return self._state_3S[2, : self.count]

    def admit(self, prompts: Sequence[tuple[int, ...]], indices: Sequence[int]) -> None:
        """Takes prompts (each at least one token) into the next slots, in order. Best when neighbours have similar lengths."""
        first = self.count
        columns = [[prompt[-1], len(prompt) - 1, index] for prompt, index in zip(prompts, indices, strict=True)]
        self._state_3S[:, first : first + len(prompts)] = torch.tensor(columns, device=self.device).T
        start = 0
        while start < len(prompts):
            end, width = start + 1, len(prompts[start])
            while end < len(prompts) and max(width, len(prompts[end])) * (end + 1 - start) <= PREFILL_TOKENS:
                width, end = max(width, len(prompts[end])), end + 1
            self._prefill(first + start, prompts[start:end])
            start = end
        self._lengths += [len(prompt) - 1 for prompt in prompts]

    def step(self) -> Tensor:
        """Feeds every row's token; returns the logits of the next one, [count, V] in the model's dtype."""
        rows = _round_up(self.count, ROW_STEP)
        tokens_N, lengths_N = self._state_3S[0, :rows], self._state_3S[1, :rows]
        span = _round_up(max(self._lengths) + 1, SPAN_STEP)
        self._cache.plan = DecodePlan(rows, span, self._slots_S[:rows], lengths_N)
        output = self._forward(tokens_N[:, None], lengths_N[:, None], self._masks(lengths_N, span))
        return output[: self.count, -1]

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
            self._cache.move(last, row, self._lengths[last])
            self._state_3S[:, row] = self._state_3S[:, last]
            self._lengths[row] = self._lengths[last]
        self._state_3S[:, last] = 0
        self._lengths.pop()

    def _prefill(self, first: int, prompts: Sequence[tuple[int, ...]]) -> None:
        """Right-padded: under a causal mask no real token sees the pads behind it. Equal prompts are computed once."""
        unique = {prompt[:-1]: None for prompt in prompts}
        if not any(unique):
            return
        width = _round_up(max(map(len, unique)), SPAN_STEP)
        order = {prompt: row for row, prompt in enumerate(unique)}
        padded = torch.tensor([prompt + (0,) * (width - len(prompt)) for prompt in unique], device=self.device)
        sources = torch.tensor([order[prompt[:-1]] for prompt in prompts], device=self.device)
        self._cache.plan = PrefillPlan(first, sources)
        # Padding may reach past the end of a table of positions.
        positions_L = self._positions_L[:width].clamp(max=self._longest - 1)
        self._forward(padded, positions_L.expand(len(unique), -1), None)

    def _forward(self, tokens_BQ: Tensor, positions_BQ: Tensor, mask: Any) -> Tensor:
        output: Any = self._model(
            input_ids=tokens_BQ,
            position_ids=positions_BQ,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits
        return logits

    def _masks(self, lengths_N: Tensor, span: int) -> Any:
        """[n, 1, 1, span], True (or 0 where masks are added) at positions a row's token may see; a dict by kind where layers differ."""
        positions_L, lengths_N1 = self._positions_L[:span], lengths_N[:, None]
        seen_NL = positions_L <= lengths_N1
        window = self._traits.window
        if window is None or span <= window:
            return self._as_mask(seen_NL)
        sliding = self._as_mask(seen_NL & (positions_L > lengths_N1 - window))
        return {FULL: self._as_mask(seen_NL), SLIDING: sliding} if FULL in self._traits.kinds else sliding

    def _as_mask(self, seen_NL: Tensor) -> Tensor:
        mask = seen_NL[:, None, None, :]
        if not self._additive:
            return mask
        dtype = next(self._model.parameters()).dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _adds_its_mask(model: nn.Module) -> bool:
    """The eager kernel adds its mask to the logits; sdpa takes True for "may attend"."""
    config: Any = model.config
    return bool(config.get_text_config()._attn_implementation == "eager")
