"""From prompts to a shard of experience: the rollout engine on one side, `ExperienceBatch` on the other."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf_dist.config.rollout import RolloutSection
from rlhf_dist.contracts.experience import ExperienceBatch, StopReason
from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.roles import GenerateRequest, RolloutInfo
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.data.records import PromptRecord, columns_of
from rlhf_dist.rollout.native import Completion, NativeEngine, RolloutRow, SamplingKey
from rlhf_dist.rollout.sampling import SamplingParams
from rlhf_dist.rollout.stopping import Decode


class SamplingEngine(Protocol):
    """What completes rows: `rollout.native.NativeEngine` or `rollout.vllm.VllmEngine`."""

    def generate(self, rows: Sequence[RolloutRow], params: SamplingParams, key: SamplingKey) -> tuple[list[Completion], Tally]:
        """Completes every row; the completions stand in the order of the rows."""
        ...


class Sampler:
    """Samples completions with an engine and packs them.

    Args:
        engine: its weights are current.
        tokenizer: the policy's.
        config: sampling settings.
        stop_tokens: ids that end a completion.
        seed: the run's seed.
    """

    def __init__(
        self,
        engine: SamplingEngine,
        tokenizer: PreTrainedTokenizerBase,
        config: RolloutSection,
        stop_tokens: Sequence[int],
        seed: int,
    ) -> None:
        self._engine, self._seed = engine, seed
        self._decode, self._plain = decoder(tokenizer), decoder(tokenizer, skip_special_tokens=True)
        self._stop_strings = tuple(config.stop_strings)
        self._params = SamplingParams(
            config.max_new_tokens, config.temperature, config.top_k, config.top_p, tuple(stop_tokens), self._stop_strings
        )

    def sample(
        self, request: GenerateRequest, before: Sequence[PromptRecord], prompts: Sequence[PromptRecord]
    ) -> Stored[ExperienceBatch, RolloutInfo]:
        """Samples a shard.

        Args:
            request: what to sample.
            before: the step's prompts that precede this shard; a prompt that stands there too gets later sample numbers here.
            prompts: the shard's prompts.
        """
        began = time.perf_counter()
        records, rows = _rows(before, prompts, request.samples_per_prompt)
        params = self._params if request.max_new_tokens is None else _shortened(self._params, request.max_new_tokens)
        # Evaluations share one key, whatever the step, so that before and after are paired.
        key = SamplingKey(self._seed, request.stream, request.step if request.stream == "train" else 0)
        completions, tally = self._engine.generate(rows, params, key)
        batch = self._pack(request.version, records, rows, completions)
        return Stored(batch, _info(batch, time.perf_counter() - began, tally))

    def _pack(
        self, version: int, records: Sequence[PromptRecord], rows: Sequence[RolloutRow], done: Sequence[Completion]
    ) -> ExperienceBatch:
        prompt = max((len(row.prompt_tokens) for row in rows), default=0)
        response = max((len(c.tokens) for c in done), default=0)
        lengths_B = torch.tensor([len(c.tokens) for c in done], dtype=torch.long)
        prompt_lengths_B = torch.tensor([len(row.prompt_tokens) for row in rows], dtype=torch.long)
        response_mask_BT = torch.arange(response) < lengths_B.unsqueeze(1)
        return ExperienceBatch(
            prompt_tokens_BP=_matrix([(0,) * (prompt - len(r.prompt_tokens)) + tuple(r.prompt_tokens) for r in rows], prompt, torch.long),
            prompt_mask_BP=torch.arange(prompt) >= prompt - prompt_lengths_B.unsqueeze(1),
            response_tokens_BT=_matrix([tuple(c.tokens) + (0,) * (response - len(c.tokens)) for c in done], response, torch.long),
            response_mask_BT=response_mask_BT,
            response_attention_BT=response_mask_BT.clone(),
            prompt_id_B=torch.tensor([row.prompt_id for row in rows], dtype=torch.long),
            sample_index_B=torch.tensor([row.sample_index for row in rows], dtype=torch.long),
            policy_version_B=torch.full((len(rows),), version, dtype=torch.long),
            stop_reason_B=torch.tensor([int(c.stop_reason) for c in done], dtype=torch.long),
            rollout_logprobs_BT=_matrix([tuple(c.logprobs) + (0.0,) * (response - len(c.logprobs)) for c in done], response, torch.float32),
            prompts=tuple(record.text for record in records),
            completions=tuple(self._text(completion) for completion in done),
            columns=columns_of(records),
        )

    def _text(self, completion: Completion) -> str:
        """The completion as rewards and people read it: without the stop token or the stop string, and without special tokens."""
        tokens = completion.tokens
        if completion.stop_reason == StopReason.STOP_STRING:
            return self._before_stop_string(tokens)
        return self._plain(tokens[:-1] if completion.stop_reason == StopReason.STOP_TOKEN else tokens)

    def _before_stop_string(self, tokens: Sequence[int]) -> str:
        """Cuts the text that generation looked at, in which special tokens show: a stop string may consist of them (`<|im_end|>`)."""
        text = self._decode(tokens)
        text = text[: min(at for at in (text.find(stop) for stop in self._stop_strings) if at >= 0)]
        count = len(tokens)
        while not text.startswith(self._decode(tokens[:count])):
            count -= 1
        rest = text[len(self._decode(tokens[:count])) :]  # what the next token says before the stop string begins
        return self._plain(tokens[:count]) + rest


def decoder(tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = False) -> Decode:
    """Token ids to text; special tokens show unless they are to be skipped."""

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    return decode


def native_sampler(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: RolloutSection, stop_tokens: Sequence[int], seed: int
) -> Sampler:
    """A sampler over a Hugging Face causal LM, with the weights that it has at each call."""
    engine = NativeEngine(model, slots=config.slots, decode=decoder(tokenizer))
    return Sampler(engine, tokenizer, config, stop_tokens, seed)


def _rows(before: Sequence[PromptRecord], prompts: Sequence[PromptRecord], samples: int) -> tuple[list[PromptRecord], list[RolloutRow]]:
    seen = Counter(record.prompt_id for record in before)
    records, rows = [], []
    for record in prompts:
        first = seen[record.prompt_id] * samples
        seen[record.prompt_id] += 1
        records += [record] * samples
        rows += [RolloutRow(tuple(record.tokens), record.prompt_id, first + number) for number in range(samples)]
    return records, rows


def _shortened(params: SamplingParams, max_new_tokens: int) -> SamplingParams:
    return dataclasses.replace(params, max_new_tokens=min(params.max_new_tokens, max_new_tokens))


def _matrix(rows: list[tuple[Any, ...]], width: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype).reshape(len(rows), width)


def _info(batch: ExperienceBatch, seconds: float, tally: Tally) -> RolloutInfo:
    return RolloutInfo(
        prompt_ids=_ints(batch.prompt_id_B),
        sample_indices=_ints(batch.sample_index_B),
        prompt_lengths=_ints(batch.prompt_lengths_B),
        response_lengths=_ints(batch.response_lengths_B),
        stop_reasons=_ints(batch.stop_reason_B),
        versions=_ints(batch.policy_version_B),
        seconds=seconds,
        tally=tally,
    )


def _ints(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.tolist())
