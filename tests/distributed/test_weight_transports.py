"""Every transport between real processes: two policy ranks under ZeRO 3, a rollout rank beside them, Ray in between."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_dist.cli.programs import PPOProgram
from rlhf_dist.cli.ray_launch import ray_groups
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.roles import PolicyRole
from rlhf_dist.coordinator.shards import Batch, Groups, collect_rollouts, generate
from rlhf_dist.coordinator.sync import WeightSync
from rlhf_dist.workers.placement import Demand

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
DEADLINE_S = 120.0


class TwoGroups(PPOProgram):
    """A run's policy and rollout groups alone."""

    def demands(self) -> list[Demand]:
        return [demand for demand in super().demands() if demand.role in ("policy", "rollout")]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_run: Callable[[Path], dict[str, Any]]) -> PPOConfig:
    root = tmp_path_factory.mktemp("transports")
    (root / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    values = tiny_run(root)
    values["policy"] |= {"ranks": 2, "cpus_per_rank": 0.5, "deepspeed": str(root / "zero3.json")}
    values["rollout"] |= {"ranks": 1, "cpus_per_rank": 0.5}
    values["placement"] = {"launcher": "ray", "call_timeout_s": DEADLINE_S}
    return PPOConfig.model_validate(values)


@pytest.fixture(scope="module")
def groups(config: PPOConfig, ray_session: None) -> Iterator[Groups]:
    with ray_groups(TwoGroups(config)) as by_role:
        yield Groups(reward=None, **by_role)  # type: ignore[arg-type]


def sync_by(transport: str, config: PPOConfig, groups: Groups) -> WeightSync:
    section = config.rollout.model_copy(update={"weight_sync": transport})
    return WeightSync(config.model_copy(update={"rollout": section}), groups, bucket_bytes=20_000)


def samples(groups: Groups, version: int) -> tuple[Any, ...]:
    """What the sampler makes of the step's first prompts, in numbers."""
    shards = generate(groups.sampler, Batch("train", 0, 0, 4, 1), version, 1)
    collect_rollouts(groups.sampler, shards)
    return tuple((shard.info.prompt_ids, shard.info.response_lengths, shard.info.versions) for shard in shards if shard.info)


@pytest.mark.parametrize("transport", ["ipc", "broadcast", "object_store"])
def test_the_rollout_rank_holds_what_two_sharded_ranks_export(transport: str, config: PPOConfig, groups: Groups) -> None:
    """Bit for bit: the checksum is over what it holds. Twice over one link, and the coordinator passes references alone (law 7)."""
    sync = sync_by(transport, config, groups)
    first = sync(3)
    before = groups.bytes_moved()
    second = sync(4)
    passed = groups.bytes_moved() - before
    assert sync.link is not None and sync.link.transport == transport
    same = ("weight_sync/checksum", "weight_sync/bytes", "weight_sync/buckets")
    assert [first[name] for name in same] == [second[name] for name in same]
    assert second["weight_sync/checksum"] == expected_checksum(config)
    assert second["weight_sync/buckets"] >= 4 and second["weight_sync/bytes"] > 60_000
    assert passed < 600 * (3 + 3 * second["weight_sync/buckets"]) < second["weight_sync/bytes"] / 4
    assert all(versions == (4,) * 4 for _, _, versions in samples(groups, 4))
    with pytest.raises(UserError, match="policy version 3, but the sampler holds 4"):
        samples(groups, 3)


def test_on_one_node_of_cpus_memory_is_mapped(config: PPOConfig, groups: Groups) -> None:
    sync = sync_by("auto", config, groups)
    sync(5)
    assert sync.link is not None and (sync.link.transport, sync.link.address) == ("ipc", "127.0.0.1")


def expected_checksum(config: PPOConfig) -> int:
    from transformers import AutoModelForCausalLM

    from rlhf_dist.models.checksum import checksum
    from rlhf_dist.workers.weight_sync import weights_of

    return checksum(weights_of(AutoModelForCausalLM.from_pretrained(config.policy.model, dtype=torch.float32)).items())


def test_a_rollout_rank_that_dies_in_a_sync_ends_it_with_a_message(config: PPOConfig, groups: Groups) -> None:
    """The last test of the module. The policy already waits for the acknowledgement when the rank goes."""
    import ray

    sync = sync_by("broadcast", config, groups)
    sync(6)
    assert sync.link is not None and groups.rollout is not None
    sending = groups.policy.submit(PolicyRole.send_weights, [(sync.link,)] * 2)
    time.sleep(1.0)
    ray.kill(groups.rollout._actors[0])  # type: ignore[attr-defined]
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        sync(7)
    assert time.monotonic() - began < DEADLINE_S / 2
    assert "rollout rank 0" in caught.value.where and sending
