"""New weights for whoever samples (law 8): a version, a checksum that all ranks must agree on, and how long that took.

With a rollout group, its ranks receive while the policy exports; a call of theirs begins only when those before it are done, so weights
that were asked for after a generation never reach it. Buckets pass this process by reference, or not at all (law 7).
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Sequence

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.group import Handle, WorkerGroup
from rlhf_dist.contracts.roles import PolicyRole, RolloutRole
from rlhf_dist.contracts.weights import Link, Place, SyncInfo, Transport
from rlhf_dist.coordinator.shards import Groups

BUCKET_BYTES = 32 * 2**20
"""Of a sync: small beside a model, so that exporting and loading overlap, and large beside the cost of handing one over."""
IN_FLIGHT = 2
LOOPBACK = "127.0.0.1"
SHARE_OF_DEADLINE = 0.9
"""A rank gives up before the coordinator does: it knows which peer it waits for."""


class WeightSync:
    """Makes the sampler hold the policy's weights.

    Args:
        config: transport and deadline.
        groups: policy, and rollout where it is a group of its own.
        bucket_bytes: cap of a bucket; None for `BUCKET_BYTES`.
    """

    def __init__(self, config: PPOConfig, groups: Groups, bucket_bytes: int | None = None) -> None:
        self._policy, self._rollout = groups.policy, groups.rollout
        self._wish, self._bucket_bytes = config.rollout.weight_sync, bucket_bytes or BUCKET_BYTES
        self._timeout_s = SHARE_OF_DEADLINE * config.placement.call_timeout_s
        self._link: Link | None = None

    def __call__(self, version: int) -> dict[str, float]:
        """Syncs to a version; returns `weight_sync/*`: seconds, bytes and buckets to each receiver, and the checksum, an exact integer.

        Raises:
            UserError: ranks hold different weights afterwards; a rank died, failed or did not answer.
        """
        began = time.perf_counter()
        infos = self._infos(version)
        sums = sorted({info.checksum for info in infos})
        if len(sums) != 1:
            raise UserError(
                f"after the sync to version {version} the ranks hold different weights (checksums {sums})",
                where="policy, weight sync" if self._rollout is None else "policy and rollout, weight sync",
                fix="the ranks have drifted apart: report this with the config; do not use the weights",
            )
        seconds = time.perf_counter() - began
        moved = {"bytes": float(infos[0].bytes), "buckets": float(infos[0].buckets), "checksum": infos[0].checksum}
        return {f"weight_sync/{name}": value for name, value in ({"seconds": seconds} | moved).items()}

    @property
    def link(self) -> Link | None:
        """The way to the rollout group; None without one, and before the first sync."""
        return self._link

    def _infos(self, version: int) -> list[SyncInfo]:
        if self._rollout is None:
            return self._policy.collect(_everyone(self._policy, PolicyRole.sync_weights, version))
        if self._link is None:
            self._link = self._linked(self._rollout)
        if self._link.transport == "object_store":
            return self._relay(self._rollout, version)
        receiving = _everyone(self._rollout, RolloutRole.receive_weights, version, self._link)
        sending = _everyone(self._policy, PolicyRole.send_weights, self._link)
        return self._policy.collect([*sending, *receiving])  # together: the first failure ends the wait for all

    def _relay(self, rollout: WorkerGroup, version: int) -> list[SyncInfo]:
        """Hands the policy's buckets over by reference, the next one being exported while the last ones are loaded."""
        taking: deque[list[Handle]] = deque()
        while True:
            exported = _everyone(self._policy, PolicyRole.next_weights, self._bucket_bytes)
            infos = self._policy.collect(exported)
            if infos[0].done is not None:
                break
            taking.append(_everyone(rollout, RolloutRole.take_weights, exported[0]))
            if len(taking) > IN_FLIGHT:
                rollout.collect(taking.popleft())
        for handles in taking:
            rollout.collect(handles)
        sent = [info.done for info in infos]
        return sent + rollout.collect(_everyone(rollout, RolloutRole.hold_weights, version, sent[0]))

    def _linked(self, rollout: WorkerGroup) -> Link:
        sender = self._policy.collect(_everyone(self._policy, PolicyRole.place))[0]
        receivers = rollout.collect(_everyone(rollout, RolloutRole.place))
        link = link_between(sender, receivers, self._wish, self._bucket_bytes, self._timeout_s)
        if link.transport == "object_store":
            return link
        first: list[tuple[Link] | None] = [(link,)]
        opened = self._policy.submit(PolicyRole.open_link, first + [None] * (self._policy.world_size - 1))
        return self._policy.collect(opened)[0]


def link_between(sender: Place, receivers: Sequence[Place], wish: str, bucket_bytes: int, timeout_s: float) -> Link:
    """The way from policy rank 0 to the rollout ranks, not open yet.

    Args:
        sender, receivers: where their weights are.
        wish: a transport, or `auto`: memory that both sides map where that is possible; a broadcast where each rank has a device that no
            other has (NCCL takes no two ranks of one GPU), or all have CPUs; the object store for everything else.

    Raises:
        UserError: the placement does not allow what was wished for.
    """
    everyone = [sender, *receivers]
    devices = [place.device for place in everyone]
    on_cpus, one_device = set(devices) == {"cpu"}, len(set(devices)) == 1
    possible: dict[Transport, bool] = {
        "ipc": one_device and sender.node != "" and len({place.node for place in everyone}) == 1,
        "broadcast": on_cpus or ("cpu" not in devices and len(set(devices)) == len(devices)),
        "object_store": True,
    }
    chosen: Transport = next(name for name, holds in possible.items() if holds) if wish == "auto" else wish  # type: ignore[assignment]
    if not possible[chosen]:
        where = ", ".join(f"{place.device} of node {place.node[:8] or '?'}" for place in everyone)
        needs = "one device, or the CPUs of one node" if chosen == "ipc" else "CPUs alone, or a GPU for each rank alone"
        fix = "set rollout.weight_sync=auto, or place the ranks otherwise"
        raise UserError(f"weight_sync {chosen} needs {needs}; policy rank 0 and the rollout ranks have {where}", where="rollout", fix=fix)
    link = Link(chosen, "gloo" if on_cpus else "nccl", sender.address, 0, len(receivers), bucket_bytes, timeout_s)
    return dataclasses.replace(link, address=LOOPBACK) if chosen == "ipc" else link


def _everyone(group: WorkerGroup, method: object, *arguments: object) -> list[Handle]:
    return group.submit(method, [arguments] * group.world_size)  # type: ignore[arg-type]
