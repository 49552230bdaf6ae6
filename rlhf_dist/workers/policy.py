"""The policy's worker: reads prompts, samples, scores its own samples, estimates advantages, trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_dist.algos.objectives import PolicyObjective
from rlhf_dist.config.errors import writing
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.engine import SavedFile
from rlhf_dist.contracts.experience import ExperienceBatch, Piece, merge_pieces
from rlhf_dist.contracts.flops import FlopModel
from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.moments import Moments
from rlhf_dist.contracts.roles import (
    EstimateRequest,
    ExperienceInfo,
    GenerateRequest,
    Needs,
    PieceInfo,
    RatioInfo,
    RestInfo,
    RolloutInfo,
    UpdateInfo,
    UpdateRequest,
    WrittenInfo,
)
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.contracts.weights import BucketInfo, Link, Place, SyncInfo
from rlhf_dist.engines.deepspeed import Training
from rlhf_dist.engines.process import Rank
from rlhf_dist.models.checksum import checksum
from rlhf_dist.models.flops import forward_flops
from rlhf_dist.models.loading import load_tokenizer, stop_tokens
from rlhf_dist.models.logprobs import HeadOptions
from rlhf_dist.models.policy import PolicyModule
from rlhf_dist.runs.checkpoints import recorded_files
from rlhf_dist.runs.rollout_log import write_rollouts
from rlhf_dist.runs.rollout_state import read_shard, write_shard
from rlhf_dist.workers.capsules import CapsuleWriter
from rlhf_dist.workers.estimation import Estimator, on_policy_gaps, token_kl
from rlhf_dist.workers.export import export_model
from rlhf_dist.workers.places import place_of
from rlhf_dist.workers.prompts import Prompts, VersionedSampler
from rlhf_dist.workers.resting import RestingModel, rest_engine
from rlhf_dist.workers.sampling import native_sampler
from rlhf_dist.workers.saving import SavedWorker
from rlhf_dist.workers.scoring import rows_of_rank, score_rows
from rlhf_dist.workers.training import Trainer, build_engine, load_policy, optimizer_steps, parameter_counts, prepare_checkpointing, seeded
from rlhf_dist.workers.weight_source import WeightSource
from rlhf_dist.workers.weight_sync import copy_weights, trained_weights_of, weights_of


class PolicyWorker(SavedWorker):
    """One rank of the policy (contracts.roles.PolicyRole and RestingRole).

    Where no rollout group samples, this rank does: under ZeRO ≤ 2 with the trainer's own parameters, under ZeRO 3 with a whole copy that
    `sync_weights` fills. Otherwise it holds neither sampler nor copy, and sends its weights.
    """

    def __init__(self, config: PPOConfig, rank: Rank) -> None:
        seeded(config.run.seed)
        section = config.policy
        self._rank, self._section, self._budget = rank, section, (section.microbatch_tokens, section.packing)
        self._tokenizer = load_tokenizer(section.model, trust_remote_code=section.trust_remote_code)
        self._stop_tokens = stop_tokens(section.model, self._tokenizer, trust_remote_code=section.trust_remote_code)
        training = Training(section.optim, optimizer_steps(config, idle=config.value.warmup_steps if config.needs_value else 0))
        self._engine = build_engine(policy_module(config), section, rank, training)
        self._prompts = Prompts(config, self._tokenizer)
        self._copy: RestingModel | None = None
        self._sampler = None if config.rollout.ranks else self._own_sampler(config)
        self._weights = WeightSource(self._engine)
        objective, capsules = policy_objective(config), CapsuleWriter(self._engine, self._tokenizer, config)
        self._trainer = Trainer(self._engine, objective, whitens=config.algorithm.whitens_advantages, capsules=capsules)
        self._estimator = Estimator(config.algorithm, config.rollout.samples_per_prompt, config.importance_cap)

    def describe(self) -> dict[str, Any]:
        """Facts about model and data."""
        return (
            parameter_counts(self._engine.module)
            | {
                "stop_tokens": list(self._stop_tokens),
                "held_out_prompts": len(self._prompts.held_out),
                "device": self._rank.device,
            }
            | self._prompts.held_out_fates
        )

    def costs(self) -> FlopModel:
        """What a forward of the policy costs."""
        return forward_flops(self._engine.module)

    def generate(self, request: GenerateRequest) -> Stored[ExperienceBatch, RolloutInfo]:
        """Samples a shard of prompts.

        Raises:
            UserError: the request is for a policy version that this sampler does not hold.
        """
        assert self._sampler is not None, "the rollout group samples"
        (self._engine if self._copy is None else self._copy).wake()
        return self._sampler.generate(request)

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

    def sync_weights(self, version: int) -> SyncInfo:
        """Gives the sampler in this process the trainer's weights.

        Raises:
            UserError: the sampler's copy does not hold what the trainer sent.
        """
        assert self._sampler is not None, "the rollout group samples"
        if self._copy is None:
            self._engine.wake()
            held = SyncInfo(checksum(self._engine.module.model.named_parameters()))
        else:
            self._copy.wake()
            whole = self._section.lora is None  # adapters stay apart: merged in half precision they would be another policy
            target = weights_of(self._copy.model) if whole else trained_weights_of(self._copy.model)
            held = copy_weights(target, self._engine.export_weights(merged=whole), version)
        self._sampler.version = version
        return held

    def rest(self, needs: Needs) -> RestInfo:
        """What the coming phase does not need leaves the device. Where a copy samples, only a sync needs both sets of weights."""
        if self._copy is None:
            return rest_engine(self._engine, needs)
        if needs not in ("sampler", "sync"):
            self._copy.rest()
        return rest_engine(self._engine, "nothing" if needs == "sampler" else needs) + self._copy.resting

    def place(self) -> Place:
        """Where the weights are."""
        return place_of(self._engine.device)

    def open_link(self, link: Link) -> Link:
        """Opens the store of a link to the rollout group."""
        return self._weights.open(link)

    def send_weights(self, link: Link) -> SyncInfo:
        """Exports all weights, and sends them where this rank opened the link."""
        return self._weights.send(link)

    def next_weights(self, bucket_bytes: int) -> Stored[Mapping[str, Tensor], BucketInfo]:
        """The next bucket of an export, for others to fetch."""
        return self._weights.next(bucket_bytes)

    def save_rollouts(self, folder: str, shards: Sequence[ExperienceBatch], infos: Sequence[RolloutInfo]) -> tuple[SavedFile, ...]:
        """Writes shards whose policy will be gone (rank 0).

        Raises:
            UserError: a data column cannot be saved; the disk is full, or may not be written to.
        """
        if self._rank.rank != 0:
            return ()
        for number, (shard, info) in enumerate(zip(shards, infos, strict=True)):
            write_shard(Path(folder), number, shard, info)
        with writing(folder):  # bringing files to disk may be what finds it full
            return recorded_files(Path(folder))

    def load_rollouts(self, folder: str, number: int) -> Stored[ExperienceBatch, RolloutInfo]:
        """One of the shards of `save_rollouts`.

        Raises:
            UserError: it is missing or damaged.
        """
        return Stored(*read_shard(Path(folder), number))

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

    def _own_sampler(self, config: PPOConfig) -> VersionedSampler:
        if self._engine.stage == 3:
            self._copy = RestingModel(load_policy(config.policy, config.run.seed).to(self._rank.device))
        sampled = self._engine.module.model if self._copy is None else self._copy.model
        sampler = native_sampler(sampled, self._tokenizer, config.rollout, self._stop_tokens, config.run.seed)
        return VersionedSampler(self._prompts, sampler, config, f"policy rank {self._rank.rank}")


def policy_objective(config: PPOConfig) -> PolicyObjective:
    """What the policy is trained on."""
    return PolicyObjective(config.algorithm, config.importance_cap)


def policy_module(config: PPOConfig) -> PolicyModule:
    """The policy before its first step, with a new adapter where it trains one.

    Raises:
        UserError: the model cannot be loaded.
    """
    section, model = config.policy, load_policy(config.policy, config.run.seed)
    options = HeadOptions(config.rollout.temperature, entropy_grad=config.algorithm.entropy_coef > 0)
    return PolicyModule(prepare_checkpointing(model, section), options, packing=section.packing)
