"""Which way weights go, who is asked what, and what a sync says of itself; the ways themselves are tested beside the workers."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.group import Stored
from rlhf_dist.contracts.weights import BucketInfo, Link, Place, SyncInfo
from rlhf_dist.coordinator.shards import Groups
from rlhf_dist.coordinator.sync import BUCKET_BYTES, LOOPBACK, WeightSync, link_between

SENT = SyncInfo(2**60 + 1, 300, 3)
HERE, THERE = Place("n1", "cpu", "10.0.0.1"), Place("n2", "cpu", "10.0.0.2")
NOWHERE = Place("", "cpu", LOOPBACK)


def gpu(name: str, node: str = "n1") -> Place:
    return Place(node, name, "10.0.0.1")


class Policy:
    """Exports three buckets; `checksum` may differ from rank to rank."""

    def __init__(self, place: Place = HERE, checksum: int = SENT.checksum) -> None:
        self._place, self._sent, self._left = place, SyncInfo(checksum, 300, 3), 3

    def sync_weights(self, version: int) -> SyncInfo:
        return SyncInfo(self._sent.checksum)

    def place(self) -> Place:
        return self._place

    def open_link(self, link: Link) -> Link:
        return Link(**(vars(link) | {"port": 77}))

    def send_weights(self, link: Link) -> SyncInfo:
        return self._sent

    def next_weights(self, bucket_bytes: int) -> Stored[Any, BucketInfo]:
        self._left -= 1
        if self._left < 0:
            self._left = 3
            return Stored({}, BucketInfo(0, self._sent))
        return Stored({"number": 2 - self._left}, BucketInfo(100))


class Rollout:
    """Remembers what it was given."""

    def __init__(self, place: Place = HERE, checksum: int = SENT.checksum) -> None:
        self._place, self._checksum = place, checksum
        self.taken: list[Any] = []
        self.versions: list[int] = []
        self.links: list[Link] = []

    def place(self) -> Place:
        return self._place

    def receive_weights(self, version: int, link: Link) -> SyncInfo:
        self.versions.append(version)
        self.links.append(link)
        return SyncInfo(self._checksum, 300, 3)

    def take_weights(self, bucket: Any) -> int:
        self.taken.append(bucket)
        return 100

    def hold_weights(self, version: int, sent: SyncInfo) -> SyncInfo:
        self.versions.append(version)
        return SyncInfo(self._checksum, sent.bytes, sent.buckets)


@pytest.fixture
def config(ppo_values: dict[str, Any]) -> PPOConfig:
    ppo_values["placement"] = {"launcher": "ray", "call_timeout_s": 100}
    ppo_values["rollout"] |= {"ranks": 2}
    return PPOConfig.model_validate(ppo_values)


def wishing(config: PPOConfig, transport: str) -> PPOConfig:
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"weight_sync": transport})})


def groups_of(local_group: Any, policies: list[Policy], rollouts: list[Rollout]) -> Groups:
    calls: list[Any] = []
    rollout = local_group("rollout", rollouts, calls) if rollouts else None
    return Groups(local_group("policy", policies, calls), local_group("reward", [None]), rollout=rollout)


def test_a_policy_that_samples_itself_moves_nothing(config: PPOConfig, local_group: Any) -> None:
    metrics = WeightSync(config, groups_of(local_group, [Policy(), Policy()], []))(4)
    assert metrics.pop("weight_sync/seconds") >= 0
    assert metrics == {"weight_sync/bytes": 0.0, "weight_sync/buckets": 0.0, "weight_sync/checksum": SENT.checksum}


def test_one_link_serves_all_syncs(config: PPOConfig, local_group: Any) -> None:
    """The policy's first rank opens it; the store listens where the receivers are."""
    rollouts = [Rollout(), Rollout()]
    groups = groups_of(local_group, [Policy(), Policy()], rollouts)
    sync = WeightSync(config, groups)
    metrics = [sync(version) for version in (0, 1)]
    link = Link("ipc", "gloo", LOOPBACK, 77, 2, BUCKET_BYTES, 90.0)
    assert sync.link == link and all(rollout.links == [link, link] and rollout.versions == [0, 1] for rollout in rollouts)
    assert metrics[1]["weight_sync/bytes"] == 300.0 and metrics[1]["weight_sync/checksum"] == SENT.checksum
    calls = [(name, rank) for name, rank, _ in groups.policy.calls]  # type: ignore[attr-defined]
    assert [rank for name, rank in calls if name == "policy.open_link"] == [0]
    assert [rank for name, rank in calls if name == "policy.send_weights"] == [0, 1, 0, 1], "an export may be collective"


def test_receivers_are_asked_before_the_policy_exports(config: PPOConfig, local_group: Any) -> None:
    groups = groups_of(local_group, [Policy()], [Rollout(), Rollout()])
    WeightSync(config, groups)(0)
    names = [name for name, *_ in groups.policy.calls]  # type: ignore[attr-defined]
    assert names[-3:] == ["rollout.receive_weights"] * 2 + ["policy.send_weights"]


def test_through_the_object_store_every_rank_gets_every_bucket_in_order(config: PPOConfig, local_group: Any) -> None:
    rollouts = [Rollout(), Rollout()]
    sync = WeightSync(wishing(config, "object_store"), groups_of(local_group, [Policy(), Policy()], rollouts))
    metrics = sync(5)
    assert all(rollout.taken == [{"number": 0}, {"number": 1}, {"number": 2}] and rollout.versions == [5] for rollout in rollouts)
    assert (metrics["weight_sync/bytes"], metrics["weight_sync/buckets"]) == (300.0, 3.0)
    sync(6)
    assert len(rollouts[0].taken) == 6


@pytest.mark.parametrize("transport", ["ipc", "object_store"])
@pytest.mark.parametrize("wrong", ["policy", "rollout"])
def test_ranks_that_hold_something_else_stop_the_run(transport: str, wrong: str, config: PPOConfig, local_group: Any) -> None:
    sums = {"policy": SENT.checksum, "rollout": SENT.checksum} | {wrong: 17}
    groups = groups_of(local_group, [Policy(), Policy(checksum=sums["policy"])], [Rollout(), Rollout(checksum=sums["rollout"])])
    with pytest.raises(UserError, match=r"after the sync to version 3 the ranks hold different weights \(checksums \[17, ") as caught:
        WeightSync(wishing(config, transport), groups)(3)
    assert caught.value.where == "policy and rollout, weight sync"


@pytest.mark.parametrize(
    ("sender", "receivers", "transport", "backend"),
    [
        (HERE, [HERE, HERE], "ipc", "gloo"),
        (HERE, [HERE, THERE], "broadcast", "gloo"),
        (NOWHERE, [NOWHERE], "broadcast", "gloo"),
        (gpu("a"), [gpu("a")], "ipc", "nccl"),
        (gpu("a"), [gpu("b"), gpu("c", "n2")], "broadcast", "nccl"),
        (gpu("a"), [gpu("a"), gpu("b")], "object_store", "nccl"),
        (gpu("a"), [gpu("b"), gpu("b")], "object_store", "nccl"),
        (gpu("a"), [HERE], "object_store", "nccl"),
        (HERE, [gpu("a")], "object_store", "nccl"),
    ],
)
def test_the_placement_decides_the_way(sender: Place, receivers: list[Place], transport: str, backend: str) -> None:
    link = link_between(sender, receivers, "auto", 10, 1.0)
    assert (link.transport, link.backend, link.receivers) == (transport, backend, len(receivers))
    assert link.address == (LOOPBACK if transport == "ipc" else sender.address), "memory is mapped on one node: nobody else is let in"


@pytest.mark.parametrize(
    ("wish", "sender", "receiver", "needs"),
    [
        ("ipc", HERE, THERE, "needs one device, or the CPUs of one node"),
        ("ipc", gpu("a"), gpu("b"), "have a of node n1, b of node n1"),
        ("broadcast", gpu("a"), gpu("a"), "a GPU for each rank alone"),
        ("broadcast", gpu("a"), HERE, "CPUs alone"),
    ],
)
def test_a_way_that_the_placement_does_not_allow_is_refused(wish: str, sender: Place, receiver: Place, needs: str) -> None:
    with pytest.raises(UserError, match=needs) as caught:
        link_between(sender, [receiver], wish, 10, 1.0)
    assert "weight_sync=auto" in caught.value.fix


@pytest.mark.parametrize("wish", ["broadcast", "object_store"])
def test_a_wish_that_can_be_met_is(wish: str) -> None:
    assert link_between(HERE, [HERE], wish, 10, 1.0).transport == wish
