"""The policy's worker: reads prompts, samples, scores its own samples, estimates advantages, trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_dist.algos.objectives import PolicyObjective
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.experience import ExperienceBatch, Piece, merge_pieces
from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.moments import Moments
from rlhf_dist.contracts.roles import (
    EstimateRequest,
    ExperienceInfo,
    GenerateRequest,
    PieceInfo,
    RatioInfo,
    RolloutInfo,
    UpdateInfo,
    UpdateRequest,
    WrittenInfo,
)
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.data.prompts import PromptRecord, PromptStream
from rlhf_dist.engines.deepspeed import Training
from rlhf_dist.engines.process import Rank
from rlhf_dist.models.checksum import checksum
from rlhf_dist.models.loading import load_tokenizer, stop_tokens
from rlhf_dist.models.logprobs import HeadOptions
from rlhf_dist.models.policy import PolicyModule
from rlhf_dist.runs.rollout_log import write_rollouts
from rlhf_dist.workers.estimation import Estimator, on_policy_gaps, token_kl
from rlhf_dist.workers.export import export_model
from rlhf_dist.workers.sampling import Sampler
from rlhf_dist.workers.scoring import rows_of_rank, score_rows
from rlhf_dist.workers.training import Trainer, build_engine, load_policy, optimizer_steps, parameter_counts, prepare_checkpointing, seeded
from rlhf_dist.workers.weight_sync import copy_weights, trained_weights_of, weights_of


class PolicyWorker:
    """One rank of the policy (contracts.roles.PolicyRole).

    Under ZeRO ≤ 2 the sampler decodes with the trainer's own parameters; under ZeRO 3 with a whole copy that `sync_weights` fills.
    """

    def __init__(self, config: PPOConfig, rank: Rank) -> None:
        seeded(config.run.seed)
        section = config.policy
        self._rank, self._section, self._budget = rank, section, (section.microbatch_tokens, section.packing)
        self._tokenizer = load_tokenizer(section.model, trust_remote_code=section.trust_remote_code)
        self._stop_tokens = stop_tokens(section.model, self._tokenizer, trust_remote_code=section.trust_remote_code)
        training = Training(section.optim, optimizer_steps(config, idle=config.value.warmup_steps if config.needs_value else 0))
        self._engine = build_engine(_module(config), section, rank, training)
        self._copy = load_policy(config.policy, config.run.seed).to(rank.device) if self._engine.stage == 3 else None
        sampled = self._engine.module.model if self._copy is None else self._copy
        self._sampler = Sampler(sampled, self._tokenizer, config.rollout, self._stop_tokens, config.run.seed)
        self._trainer = Trainer(self._engine, PolicyObjective(config.algorithm), whitens=config.algorithm.whitens_advantages)
        self._estimator = Estimator(config.algorithm, config.rollout.samples_per_prompt)
        self._train_prompts = PromptStream(config.data, self._tokenizer, split="train", seed=config.run.seed)
        self._eval_prompts, self._eval_fates = _held_out(config, self._tokenizer)
        self._step_start, self._step_prompts = -1, list[PromptRecord]()
        self._version = -1
        self._keeps_sampled_logprobs = config.algorithm.old_logprobs == "sampler"

    def describe(self) -> dict[str, Any]:
        """Facts about model and data."""
        return (
            parameter_counts(self._engine.module)
            | {
                "stop_tokens": list(self._stop_tokens),
                "held_out_prompts": len(self._eval_prompts),
                "device": self._rank.device,
            }
            | self._eval_fates
        )

    def generate(self, request: GenerateRequest) -> Stored[ExperienceBatch, RolloutInfo]:
        """Samples a shard of prompts.

        Raises:
            UserError: the request is for a policy version that this sampler does not hold.
        """
        if request.version != self._version:
            raise UserError(
                f"asked for samples of policy version {request.version}, but the sampler holds {self._version}",
                where=f"policy rank {self._rank.rank}, generate",
                fix="sync the weights before generating",
            )
        read = self._read_eval if request.stream == "eval" else self._read_train
        prompts = read(request.step_start, request.start - request.step_start + request.count)
        ahead = request.start - request.step_start
        answer = self._sampler.sample(request, prompts[:ahead], prompts[ahead:])
        if self._keeps_sampled_logprobs:
            payload = answer.payload.replace(old_logprobs_BT=answer.payload.rollout_logprobs_BT)
            answer = dataclasses.replace(answer, payload=payload)
        mine = prompts[ahead:]
        dropped, truncated = sum(p.skipped for p in mine), sum(p.truncated for p in mine)
        return Stored(answer.payload, dataclasses.replace(answer.info, dropped_prompts=dropped, truncated_prompts=truncated))

    def score(self, shard: ExperienceBatch) -> Stored[Piece, PieceInfo]:
        """Old log-probs by the training forward, of this rank's rows."""
        return score_rows(self._engine, shard, {"logprobs_BT": "old_logprobs_BT"}, *self._budget)

    def reference_score(self, shard: ExperienceBatch) -> Stored[Piece, PieceInfo]:
        """Log-probs with the adapter off, of this rank's rows."""
        return score_rows(self._engine, shard, {"logprobs_BT": "ref_logprobs_BT"}, *self._budget, adapter=False)

    def estimate(
        self, request: EstimateRequest, shard: ExperienceBatch, pieces: Sequence[Piece]
    ) -> Stored[ExperienceBatch, ExperienceInfo]:
        """Advantages and returns of a shard."""
        return self._estimator(request, shard, pieces)

    def ratio_check(self, shard: ExperienceBatch, pieces: Sequence[Piece]) -> RatioInfo:
        """Compares a forward of single rows with the sampler's, the old (from whole microbatches) and the reference log-probs."""
        batch = merge_pieces(shard, pieces)
        rows = rows_of_rank(len(batch), self._rank.rank, self._rank.world_size)
        singles = [batch.select([row]) for row in rows]
        tally = Tally()
        for single, outputs in zip(singles, self._engine.forward(singles), strict=True):
            on_policy_gaps(single, outputs["logprobs_BT"], tally)
        return RatioInfo(tally)

    def load_experience(self, shards: Sequence[ExperienceBatch], advantages: Moments) -> int:
        """Keeps the step's experience for the updates."""
        return self._trainer.load(shards, advantages)

    def update(self, request: UpdateRequest) -> UpdateInfo:
        """One optimizer step."""
        return self._trainer.update(request)

    def sync_weights(self, version: int) -> int:
        """Gives the sampler the trainer's weights; returns their checksum.

        Raises:
            UserError: the sampler's copy does not hold what the trainer sent.
        """
        if self._copy is None:
            held = checksum(self._engine.module.model.named_parameters())
        else:
            whole = self._section.lora is None  # adapters stay apart: merged in half precision they would be another policy
            target = weights_of(self._copy) if whole else trained_weights_of(self._copy)
            held = copy_weights(target, self._engine.export_weights(merged=whole))
        self._version = version
        return held

    def write_rollouts(
        self, path: str, shards: Sequence[ExperienceBatch], pieces: Sequence[Sequence[Piece]], details: Sequence[dict[str, Any]]
    ) -> WrittenInfo:
        """Writes shards as one Parquet file, dropped samples included (rank 0)."""
        if self._rank.rank != 0:
            return WrittenInfo()
        columns = {name: [x for part in details for x in part[name]] for name in details[0]}
        merged = [merge_pieces(shard, parts) for shard, parts in zip(shards, pieces, strict=True)]
        batch = ExperienceBatch.concat(merged)
        return WrittenInfo(write_rollouts(Path(path), batch, columns), tuple(token_kl(batch).double().sum(1).tolist()))

    def export(self, folder: str) -> None:
        """Writes the policy as a Hugging Face folder, adapters merged."""
        export_model(self._engine, self._engine.module.model, self._tokenizer, folder)

    def _read_train(self, start: int, count: int) -> list[PromptRecord]:
        """Keeps the step's prompts: a later shard of the step asks for them again, and the stream only reads on cheaply."""
        if start != self._step_start:
            self._step_start, self._step_prompts = start, []
        missing = count - len(self._step_prompts)
        if missing > 0:
            self._step_prompts += self._train_prompts.batch(start + len(self._step_prompts), missing)
        return self._step_prompts[:count]

    def _read_eval(self, start: int, count: int) -> list[PromptRecord]:
        return self._eval_prompts[start : start + count]


def _module(config: PPOConfig) -> PolicyModule:
    section, model = config.policy, load_policy(config.policy, config.run.seed)
    options = HeadOptions(config.rollout.temperature, entropy_grad=config.algorithm.entropy_coef > 0)
    return PolicyModule(prepare_checkpointing(model, section), options, packing=section.packing)


def _held_out(config: PPOConfig, tokenizer: Any) -> tuple[list[PromptRecord], dict[str, int]]:
    """The held-out prompts, and how many of them were dropped or truncated, where any were."""
    if not config.data.eval and not config.data.eval_fraction:
        return [], {}
    stream = PromptStream(config.data, tokenizer, split="eval", seed=config.run.seed, limit=config.evaluation.max_prompts)
    prompts = list(stream.finite())
    fates = {"held_out_dropped": stream.dropped, "held_out_truncated": stream.truncated}
    return prompts, {name: count for name, count in fates.items() if count}
