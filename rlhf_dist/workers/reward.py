"""The reward's worker: user functions each in a process of its own, endpoints, model rewards each on an engine of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.config.rewards import ModelReward as ModelRewardSection
from rlhf_dist.config.rewards import Source
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.contracts.reward import RewardFailure, RewardRequest, RewardResult
from rlhf_dist.contracts.roles import Needs, RestInfo, ScoreInfo, Stream
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.engines.deepspeed import DeepSpeedEngine
from rlhf_dist.engines.process import Rank
from rlhf_dist.models.classifier import ClassifierModule, load_classifier
from rlhf_dist.models.loading import load_tokenizer
from rlhf_dist.rewards.guard import GuardedReward
from rlhf_dist.rewards.model import ModelReward
from rlhf_dist.rewards.quarantine import Quarantine
from rlhf_dist.rewards.sources import guarded
from rlhf_dist.rewards.text import RewardEncoder
from rlhf_dist.workers.resting import rest_engine
from rlhf_dist.workers.scoring import rows_of_rank
from rlhf_dist.workers.training import build_engine


@dataclass(frozen=True)
class _Given:
    """What a rank judges: its rows of a shard, and what the shard was made for."""

    shard: ExperienceBatch
    rows: tuple[int, ...]
    stream: Stream
    step: int | None


class RewardWorker:
    """One rank of the rewards (contracts.roles.RewardRole and RestingRole).

    Rewards are judged in the order of the config, so engines meet on all ranks. Where engines take turns, so do those of several rewards.
    """

    def __init__(self, config: PPOConfig, rank: Rank) -> None:
        self._rank = rank
        self._quarantine: Quarantine | None = None
        self._engines: dict[str, DeepSpeedEngine] = {}
        self._rewards = [self._loaded(config, source) for source in config.reward.sources]
        self._takes_turns = config.placement.offload == "idle" and len(self._engines) > 1

    def quarantine_to(self, path: str) -> None:
        """Failed samples are appended to this file from now on."""
        self._quarantine = Quarantine(path, self._rank.rank)

    def judge(self, shard: ExperienceBatch, stream: Stream = "train", step: int | None = None) -> ScoreInfo:
        """Raw rewards of this rank's rows."""
        began = time.perf_counter()
        rows = rows_of_rank(len(shard), self._rank.rank, self._rank.world_size)
        tally = Tally()
        results = tuple(self._one(reward, _Given(shard, rows, stream, step), tally) for reward in self._rewards)
        return ScoreInfo(rows, results, time.perf_counter() - began, tally)

    def rest(self, needs: Needs) -> RestInfo:
        """What the coming phase does not need leaves the device; functions have nothing there."""
        return sum((rest_engine(engine, needs) for engine in self._engines.values()), RestInfo())

    def _loaded(self, config: PPOConfig, source: Source) -> GuardedReward | ModelReward:
        if not isinstance(source, ModelRewardSection):
            return guarded(source)
        module = load_classifier(config.reward, source.model, source.label, source.transform)
        engine = self._engines[source.name] = build_engine(module, config.reward, self._rank)
        if config.placement.offload == "idle":
            engine.rest(weights=True)  # before the next one is loaded
        return ModelReward(source.name, engine, _encoder(config, source, module), config.reward.microbatch_tokens)

    def _one(self, reward: GuardedReward | ModelReward, given: _Given, tally: Tally) -> RewardResult:
        if isinstance(reward, ModelReward):
            result, counted = reward.score(given.shard, given.rows)
            tally.merge(counted)
            if self._takes_turns:
                self._engines[reward.name].rest(weights=True)
            return result
        if not given.rows:
            return RewardResult(reward.name, ())
        return reward(_request(given.shard, given.rows), lambda failures: self._put_aside(reward.name, given, failures))

    def _put_aside(self, reward: str, given: _Given, failures: Mapping[int, RewardFailure]) -> None:
        if self._quarantine is not None:
            of_shard = {given.rows[position]: failure for position, failure in failures.items()}
            self._quarantine.add(reward, given.shard, of_shard, given.stream, given.step)


def _request(shard: ExperienceBatch, rows: tuple[int, ...]) -> RewardRequest:
    columns: dict[str, list[Any]] = {name: [values[row] for row in rows] for name, values in shard.columns.items()}
    return RewardRequest([shard.prompts[row] for row in rows], [shard.completions[row] for row in rows], columns)


def _encoder(config: PPOConfig, source: ModelRewardSection, module: ClassifierModule) -> RewardEncoder:
    return RewardEncoder(
        load_tokenizer(source.model, trust_remote_code=config.reward.trust_remote_code),
        load_tokenizer(config.policy.model, trust_remote_code=config.policy.trust_remote_code),
        module.input_limit(source.max_tokens),
        source.overlong,
        config.data.messages_field,
    )
