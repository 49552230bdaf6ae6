"""The native rollout engine: a decode loop over the Hugging Face model. Rows leave as they end; waiting prompts take their slots.

A completion depends on the weights, the prompt, its id, the sample index and the key alone: its uniform numbers are fixed before the
first token is drawn, and no row sees another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import StopReason
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.rollout.decoder import SlotDecoder
from rlhf_dist.rollout.forward import Forward, fastest_forward
from rlhf_dist.rollout.graphs import StepGraphs, graphs_for
from rlhf_dist.rollout.philox import stream_key, uniforms
from rlhf_dist.rollout.probe import check_decoding, graphs_hold
from rlhf_dist.rollout.sampling import Draw, SamplingParams, draw
from rlhf_dist.rollout.stopping import Decode, StopRule
from rlhf_dist.rollout.traits import decoding, read_traits

REFILL_SHARE = 8
"""Prompts are taken in once this part (1/8) of the slots is free: a prefill of several rows costs little more than that of one."""


@dataclass(frozen=True)
class RolloutRow:
    """A prompt to complete. `max_new_tokens` shortens the limit of `SamplingParams` for this row."""

    prompt_tokens: tuple[int, ...]
    prompt_id: int
    sample_index: int
    max_new_tokens: int | None = None

    @property
    def where(self) -> str:
        """Which row an error is about."""
        return f"prompt id {self.prompt_id}, sample {self.sample_index}"

    def limit(self, params: SamplingParams) -> int:
        """Its new tokens at most.

        Raises:
            UserError: an empty prompt, or no new token to make.
        """
        if not self.prompt_tokens:
            raise UserError("the prompt holds no token", where=self.where, fix="give every prompt at least one token, such as BOS")
        limit = params.max_new_tokens if self.max_new_tokens is None else min(self.max_new_tokens, params.max_new_tokens)
        if limit < 1:
            raise UserError(f"max_new_tokens of the row is {limit}", where=self.where, fix="ask for at least one new token")
        return limit


@dataclass(frozen=True)
class Completion:
    """The sampled tokens, the stop token included, with their log-probabilities (nats, at the sampling temperature, unfiltered)."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop_reason: StopReason


@dataclass(frozen=True)
class SamplingKey:
    """What the random numbers of a call depend on, beside each row's own ids. `stream` is "train" or "eval"."""

    seed: int
    stream: str
    step: int


class NativeEngine:
    """Samples completions with a model's parameters as they are at the time of the call; keeps nothing of them between calls.

    Args:
        model: a Hugging Face causal LM, peft-wrapped or not, on its device and in its dtype.
        slots: rows decoded side by side.
        decode: token ids to text; needed with stop strings.

    Raises:
        UserError: the model is of a kind that a key/value cache cannot decode.
    """

    def __init__(self, model: torch.nn.Module, *, slots: int, decode: Decode | None = None) -> None:
        if slots < 1:
            raise UserError(f"slots is {slots}", where="rollout.slots", fix="set it to at least 1")
        self._model, self._slots, self._decode = model, slots, decode
        self._traits = read_traits(model)
        self._replays: bool | None = None

    def generate(self, rows: Sequence[RolloutRow], params: SamplingParams, key: SamplingKey) -> tuple[list[Completion], Tally]:
        """Completes every row; the completions stand in the order of the rows.

        The tally holds `rollout/rows_per_step` (rows in one decode step) and, with top-k or top-p, `rollout/kept_mass` (mean
        probability the filters leave).

        Raises:
            UserError: an empty prompt, a prompt that with its new tokens exceeds the model's context, stop strings without `decode`,
                logits that are not finite, or a model whose cached decoding disagrees with its own forward (looked at once).
        """
        rule = StopRule(params, self._decode)
        limits = [self._limit(row, params) for row in rows]
        if not rows:
            return [], Tally()
        slots = min(self._slots, len(rows))
        longest = max(len(row.prompt_tokens) + limit for row, limit in zip(rows, limits, strict=True))
        with decoding(self._model), fastest_forward(self._model) as forward:
            graphs = self._graphs(forward)
            decoder = SlotDecoder(self._model, self._traits, slots, longest, forward=forward, graphs=graphs)
            return _Run(decoder, slots, _Work(rows, limits, params, rule, key)).completions()

    def _graphs(self, forward: Forward) -> StepGraphs | None:
        """New ones for a call, where the model's steps can be replayed: a look at the first call tells, and whether it decodes at all."""
        device = next(self._model.parameters()).device
        if self._replays is None:
            check_decoding(self._model, self._traits, forward)
            self._replays = graphs_hold(self._model, self._traits, graphs_for(device))
        return graphs_for(device) if self._replays else None

    def _limit(self, row: RolloutRow, params: SamplingParams) -> int:
        limit = row.limit(params)
        self._traits.check_length(len(row.prompt_tokens), limit, row.where)
        return limit


@dataclass
class RunningRow:
    """A row being completed; `position` is its place among the rows of the call."""

    position: int
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class _Work:
    """What one call asks for; `limits` are the rows' new tokens at most."""

    rows: Sequence[RolloutRow]
    limits: Sequence[int]
    params: SamplingParams
    rule: StopRule
    key: SamplingKey


class _Run:
    """One call of `generate`: schedule, run, postprocess until nothing is left."""

    def __init__(self, decoder: SlotDecoder, slots: int, work: _Work) -> None:
        self._decoder, self._slots = decoder, slots
        self._rows, self._limits, self._params, self._rule = work.rows, work.limits, work.params, work.rule
        self._width = max(work.limits)
        self._uniforms = uniforms(
            stream_key(work.key.seed, work.key.stream, work.key.step),
            [row.prompt_id for row in work.rows],
            [row.sample_index for row in work.rows],
            self._width,
            decoder.device,
        ).flatten()
        # Longest prompts first: a run that does not fit in memory fails at its start. Samples of one prompt stand together, so that at
        # most one group is cut by a refill. Popped from the end.
        self._waiting = sorted(range(len(work.rows)), key=lambda i: (len(work.rows[i].prompt_tokens), work.rows[i].prompt_tokens))
        self._active: list[RunningRow] = []
        self._done: list[Completion | None] = [None] * len(work.rows)
        self._tally = Tally()

    def completions(self) -> tuple[list[Completion], Tally]:
        """Runs to the end."""
        while self._waiting or self._active:
            self._schedule()
            drawn = self._run()
            self._postprocess(drawn)
        return [completion for completion in self._done if completion is not None], self._tally

    def _schedule(self) -> None:
        free, waiting = self._slots - len(self._active), len(self._waiting)
        if not waiting or (self._active and free < min(waiting, max(1, self._slots // REFILL_SHARE))):
            return
        taken = [self._waiting.pop() for _ in range(min(free, waiting))]
        prompts = [self._rows[i].prompt_tokens for i in taken]
        cut = bool(self._waiting) and self._rows[self._waiting[-1]].prompt_tokens == prompts[-1]
        self._decoder.admit(prompts, [i * self._width for i in taken], keep_last=cut)
        self._active += [RunningRow(i, self._limits[i]) for i in taken]

    def _run(self) -> Draw:
        drawn = draw(self._decoder.step(), self._uniforms[self._decoder.indices_N], self._params)
        self._decoder.feed(drawn.tokens_N)
        return drawn

    def _postprocess(self, drawn: Draw) -> None:
        rows = len(self._active)
        self._tally.add("rollout/rows_per_step", rows, 1)
        if drawn.kept_mass_N is not None:
            self._tally.add("rollout/kept_mass", float(drawn.kept_mass_N.sum()), rows)
        ended = [self._take(*pair) for pair in zip(self._active, drawn.tokens_N.tolist(), drawn.logprobs_N.tolist(), strict=True)]
        # From the back: the row that moves into a freed slot is then one that goes on.
        for slot in reversed([slot for slot, end in enumerate(ended) if end]):
            self._decoder.drop(slot)
            self._active[slot] = self._active[-1]
            self._active.pop()

    def _take(self, running: RunningRow, token: int, logprob: float) -> bool:
        """Appends a token; whether the row has ended."""
        if token < 0:
            raise diverged(self._rows[running.position], len(running.tokens))
        running.tokens.append(token)
        running.logprobs.append(logprob)
        reason = self._rule.reason(running.tokens, running.limit)
        if reason is not None:
            self._done[running.position] = Completion(tuple(running.tokens), tuple(running.logprobs), reason)
        return reason is not None


def diverged(row: RolloutRow, token: int) -> UserError:
    """What to say when there is nothing to sample a row's next token from."""
    return UserError(
        "the policy's logits are not finite",
        where=f"{row.where}, token {token}",
        fix="the weights have overflowed or diverged: lower the learning rate, or use bf16 or fp32 in place of fp16",
    )
