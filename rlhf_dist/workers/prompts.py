"""What a rank that samples does around its sampler: it reads the prompts of a request itself, and holds a policy version (law 8)."""

from __future__ import annotations

import dataclasses
from typing import Any

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.roles import GenerateRequest, RolloutInfo
from rlhf_dist.data.prompts import PromptRecord, PromptStream
from rlhf_dist.workers.sampling import Sampler


class Prompts:
    """The prompts of both streams, the same on every rank.

    Args:
        config: data files and seed.
        tokenizer: the policy's.
    """

    def __init__(self, config: PPOConfig, tokenizer: Any) -> None:
        self._train = PromptStream(config.data, tokenizer, split="train", seed=config.run.seed)
        self.held_out, self.held_out_fates = _held_out(config, tokenizer)
        self._step_start, self._step = -1, list[PromptRecord]()

    def of(self, request: GenerateRequest) -> tuple[list[PromptRecord], list[PromptRecord]]:
        """The step's prompts before those of the request, and those of the request."""
        ahead = request.start - request.step_start
        read = self._read_eval if request.stream == "eval" else self._read_train
        prompts = read(request.step_start, ahead + request.count)
        return prompts[:ahead], prompts[ahead:]

    def _read_train(self, start: int, count: int) -> list[PromptRecord]:
        """Keeps the step's prompts: a later shard of the step asks for them again, and the stream only reads on cheaply."""
        if start != self._step_start:
            self._step_start, self._step = start, []
        missing = count - len(self._step)
        if missing > 0:
            self._step += self._train.batch(start + len(self._step), missing)
        return self._step[:count]

    def _read_eval(self, start: int, count: int) -> list[PromptRecord]:
        return self.held_out[start : start + count]


class VersionedSampler:
    """Answers the coordinator's requests with the policy version that it holds, and with no other.

    Args:
        prompts: read here, so that no text passes through the coordinator.
        sampler: its model's weights are those of `version`.
        config: whether the sampler's log-probs are the old ones.
        where: role and rank, for messages.
    """

    def __init__(self, prompts: Prompts, sampler: Sampler, config: PPOConfig, where: str) -> None:
        self._prompts, self._sampler, self._where = prompts, sampler, where
        self._keeps_sampled_logprobs = config.algorithm.old_logprobs == "sampler"
        self.version = -1

    def generate(self, request: GenerateRequest) -> Stored[ExperienceBatch, RolloutInfo]:
        """Samples a shard of prompts.

        Raises:
            UserError: the request is for a policy version that this sampler does not hold.
        """
        if request.version != self.version:
            raise UserError(
                f"asked for samples of policy version {request.version}, but the sampler holds {self.version}",
                where=f"{self._where}, generate",
                fix="sync the weights before generating",
            )
        before, mine = self._prompts.of(request)
        answer = self._sampler.sample(request, before, mine)
        batch = answer.payload
        if self._keeps_sampled_logprobs:
            batch = batch.replace(old_logprobs_BT=batch.rollout_logprobs_BT)
        dropped, truncated = sum(p.skipped for p in mine), sum(p.truncated for p in mine)
        return Stored(batch, dataclasses.replace(answer.info, dropped_prompts=dropped, truncated_prompts=truncated))


def _held_out(config: PPOConfig, tokenizer: Any) -> tuple[list[PromptRecord], dict[str, int]]:
    """The held-out prompts, and how many of them were dropped or truncated, where any were."""
    if not config.data.eval and not config.data.eval_fraction:
        return [], {}
    stream = PromptStream(config.data, tokenizer, split="eval", seed=config.run.seed, limit=config.evaluation.max_prompts)
    prompts = list(stream.finite())
    fates = {"held_out_dropped": stream.dropped, "held_out_truncated": stream.truncated}
    return prompts, {name: count for name, count in fates.items() if count}
