"""What to do when processes of a PPO run die or hang: who is gone, and what can be asked again.

Three ways back, the cheapest that is exact:

- reference, reward or rollout ranks: their group is started anew and asked again for what it still owed; nothing else notices.
- policy or value ranks, or anyone while these train: both go back to the last committed checkpoint, and the steps since are replayed.
- the coordinator itself: not here; who started it starts it again, and it goes on from the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from rlhf_dist.contracts.group import SupervisedGroup, WorkerGroup
from rlhf_dist.coordinator.pipeline import Pipeline
from rlhf_dist.coordinator.shards import JUDGED, REFERENCE, Groups, Shard


def dead(groups: Groups) -> list[WorkerGroup]:
    """The groups of which a rank gives no sign of life."""
    return [group for group in groups.all() if isinstance(group, SupervisedGroup) and not group.alive()]


def lost_rollouts(sampler: WorkerGroup, pipeline: Pipeline) -> list[int]:
    """The pending steps of which a shard is gone, or all are."""
    group = cast(SupervisedGroup, sampler)
    pending = sorted(pipeline.pending.items())
    return [step for step, shards in pending if not shards or not group.intact([shard.rollouts for shard in shards])]


def forget_lost(groups: Groups, shards: Sequence[Shard]) -> int:
    """Lets go of what reference and rewards owed of the shards and cannot give any more, so that they are asked again.

    Returns:
        How many askings were lost.
    """
    count = 0
    for name, group in ((REFERENCE, groups.reference), (JUDGED, groups.reward)):
        for shard in shards:
            if name in shard.asked and not cast(SupervisedGroup, group).intact(shard.asked[name]):
                del shard.asked[name]
                count += 1
    return count
