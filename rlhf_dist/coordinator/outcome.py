"""What came out of one PPO step, and the metrics made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf_dist.contracts.tally import Tally, merged
from rlhf_dist.coordinator.experience import Experience
from rlhf_dist.coordinator.judging import Judged
from rlhf_dist.coordinator.shards import Shard
from rlhf_dist.coordinator.update import UpdateReport
from rlhf_dist.runs.clock import Clock


@dataclass(frozen=True)
class StepOutcome:
    """A finished step, over all ranks.

    clock: seconds by phase; bytes_moved: what passed through the coordinator; staleness: of the samples.
    """

    shards: Sequence[Shard]
    judged: Judged
    experience: Experience
    report: UpdateReport
    clock: Clock
    bytes_moved: int
    staleness: Tally = field(default_factory=Tally)

    @property
    def episodes(self) -> int:
        """Sequences that were trained on."""
        return len(self.experience.kl)

    @property
    def kl(self) -> float:
        """Mean over those sequences of Σ k1, in nats: what the adaptive controller is fed (NUMERICS §1)."""
        return sum(self.experience.kl) / self.episodes

    @property
    def mean_return(self) -> float:
        """Mean of score − β Σ k1: what the baseline of `reinforce` follows."""
        return self.experience.tally.means()["objective/rlhf_reward"]

    @property
    def dropped(self) -> int:
        """Samples left out with their groups, because no reward judged one of the group."""
        return len(self.judged.keep) - sum(self.judged.keep)

    @property
    def dropped_prompts(self) -> int:
        """Prompts that were dropped as too long before those of this step."""
        return sum(shard.info.dropped_prompts for shard in self.shards if shard.info is not None)

    def metrics(self) -> dict[str, float]:
        """All metrics of the step under the names the ecosystem knows."""
        sampled = [shard.info.tally for shard in self.shards if shard.info is not None]
        scored = [info.tally for shard in self.shards for info in shard.scored]
        counted = merged([*sampled, *scored, self.staleness, self.judged.tally, self.experience.tally]).means()
        moved = {"coordinator/bytes_per_sample": self.bytes_moved / len(self.judged.keep)}
        truncated = sum(shard.info.truncated_prompts for shard in self.shards if shard.info is not None)
        fates = {"data/dropped_prompts": float(self.dropped_prompts), "data/truncated_prompts": float(truncated)}
        return counted | self.report.metrics | self.clock.metrics() | moved | fates
