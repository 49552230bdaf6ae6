"""One rank of the rollout group: it samples and does nothing else, from weights that the policy sends.

It may run in another environment (`rollout.python`): nothing that is imported here, or by `workers.ray_group`, needs deepspeed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.roles import GenerateRequest, Needs, RestInfo, RolloutInfo
from rlhf_dist.contracts.weights import Link, Place, SyncInfo
from rlhf_dist.engines.process import Rank
from rlhf_dist.models.adapters import find_adapter
from rlhf_dist.models.loading import TORCH_DTYPES, load_causal_lm, load_config, load_tokenizer, local, stop_tokens
from rlhf_dist.rollout.native import NativeEngine
from rlhf_dist.rollout.stopping import Decode
from rlhf_dist.rollout.vllm import VllmEngine, VllmSettings
from rlhf_dist.workers.places import place_of
from rlhf_dist.workers.prompts import Prompts, VersionedSampler
from rlhf_dist.workers.resting import RestingModel, SleepingVllm
from rlhf_dist.workers.sampling import Sampler, SamplingEngine, decoder
from rlhf_dist.workers.weight_link import Receiver
from rlhf_dist.workers.weight_sync import CopyTarget, WeightTarget, adopted, weights_of

GIB = 2**30
CACHE_BLOCK, LEAST_CACHE_GIB = 128, 0.0625
"""Tokens in vLLM's largest block of cache, the last one of a row being part empty; and what it keeps beside."""


class RolloutWorker:
    """Samples (contracts.roles.RolloutRole and RestingRole). Holds no version until the first sync.

    Args:
        config: the whole config.
        rank: without a process group.
    """

    def __init__(self, config: PPOConfig, rank: Rank) -> None:
        section = config.policy
        self._rank, self._device, self._where = rank, torch.device(rank.device), f"rollout rank {rank.rank}"
        tokenizer = load_tokenizer(section.model, trust_remote_code=section.trust_remote_code)
        stops = stop_tokens(section.model, tokenizer, trust_remote_code=section.trust_remote_code)
        engine, self._target, self._weights = _engine(config, decoder(tokenizer), self._device)
        sampler = Sampler(engine, tokenizer, config.rollout, stops, config.run.seed)
        self._sampler = VersionedSampler(Prompts(config, tokenizer), sampler, config, self._where)
        self._receivers: dict[Link, Receiver] = {}

    def generate(self, request: GenerateRequest) -> Stored[ExperienceBatch, RolloutInfo]:
        """Samples a shard of prompts.

        Raises:
            UserError: the request is for a policy version that this sampler does not hold.
        """
        self._weights.wake()
        return self._sampler.generate(request)

    def rest(self, needs: Needs) -> RestInfo:
        """Where the coming phase needs nothing, the weights leave the device."""
        if needs == "nothing":
            self._weights.rest()
        return self._weights.resting

    def place(self) -> Place:
        """Where the weights are."""
        return place_of(self._device)

    def receive_weights(self, version: int, link: Link) -> SyncInfo:
        """Takes all weights over a link, which it joins when it first hears of it.

        Raises:
            UserError: the policy does not answer within the deadline; the model does not hold what was sent.
        """
        self._begin_update()
        if link not in self._receivers:
            self._receivers[link] = Receiver(link, self._rank.rank, self._device)
        return self.hold_weights(version, self._receivers[link].receive(self._target.load_bucket))

    def take_weights(self, bucket: Mapping[str, Tensor]) -> int:
        """Takes one bucket that came by reference.

        Raises:
            UserError: the model has no such weight.
        """
        self._begin_update()
        self._target.load_bucket(bucket)
        return sum(weight.nbytes for weight in bucket.values())

    def hold_weights(self, version: int, sent: SyncInfo) -> SyncInfo:
        """All buckets have come: from now on this rank samples version `version`.

        Raises:
            UserError: the model does not hold what was sent.
        """
        held = adopted(self._target, version, sent)
        self._sampler.version = version
        return held

    def _begin_update(self) -> None:
        """From the first bucket until all have come and were checked, the weights are of no version, and nothing is sampled with them."""
        self._weights.wake()
        self._sampler.version = -1


def _engine(config: PPOConfig, decode: Decode, device: torch.device) -> tuple[SamplingEngine, WeightTarget, RestingModel | SleepingVllm]:
    """What samples, what takes weights, and what rests."""
    if config.rollout.engine == "vllm":
        sleeps = config.placement.offload == "idle" and device.type == "cuda"
        vllm = VllmEngine(dataclasses.replace(_vllm_settings(config), sleep=sleeps), decode=decode)
        return vllm, vllm, SleepingVllm(vllm, sleeps)
    model = load_causal_lm(plain_section(config), config.policy.model).to(device)
    rests = RestingModel(model)
    return NativeEngine(model, slots=config.rollout.slots, decode=decode), CopyTarget(weights_of(model)), rests


def plain_section(config: PPOConfig) -> EngineSection:
    """The policy as it is sent: in its precision, without adapter, no layer in 4 bits."""
    policy = config.policy
    return EngineSection(dtype=policy.dtype, attention=policy.attention, trust_remote_code=policy.trust_remote_code)


def _vllm_settings(config: PPOConfig) -> VllmSettings:
    """The key/value cache has room for all slots at their longest, and takes no more."""
    section, rollout = config.policy, config.rollout
    adapter = find_adapter(local(section.model))
    length = config.data.max_prompt_tokens + rollout.max_new_tokens
    model = load_config(section.model, trust_remote_code=section.trust_remote_code)
    cache = rollout.slots * (length + CACHE_BLOCK) * cache_bytes_per_token(model, TORCH_DTYPES[section.dtype])
    return VllmSettings(
        model=local(section.model) if adapter is None else adapter.base,
        max_model_len=length,
        dtype=section.dtype,
        slots=rollout.slots,
        kv_cache_gib=max(cache / GIB, LEAST_CACHE_GIB),
        trust_remote_code=section.trust_remote_code,
    )


def cache_bytes_per_token(model: Any, dtype: torch.dtype) -> int:
    """Keys and values of one position in all layers.

    Args:
        model: a Hugging Face configuration.
    """
    text = model.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width * dtype.itemsize)
