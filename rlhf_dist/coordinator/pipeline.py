"""Which rollouts are asked for when, and those on their way: staleness is bounded by schedule, never by timing (law 8).

Version v is the policy after v steps. With `rollout.max_staleness` k, step t trains on samples of version max(0, t − k). So when step t
begins, and the policy is of version t, the samples of step t + k are asked for; before step 0 those of steps 0 to k; and none beyond the
last step. With k = 1 and four steps::

    before step 0: ask for 0 and 1 (version 0)    1: ask for 2 (version 1)    2: ask for 3 (version 2)    3: nothing is left to ask for

Who samples works off what it was asked in order, so the weights of a new version come behind the samples asked for before it, and a rollout
group samples for the next step while this one trains. k = 0 is the same loop: each step asks for its own samples, and waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.coordinator.shards import Shard


@dataclass
class Pipeline:
    """The rollouts that were asked for and not yet trained on. Asking again for the same step asks for nothing.

    steps: of the whole run. max_staleness: k. asked: steps whose rollouts were asked for so far.
    pending: their shards by step, of k + 1 steps at most.
    """

    steps: int
    max_staleness: int = 0
    asked: int = 0
    pending: dict[int, list[Shard]] = field(default_factory=dict)

    def version(self, step: int) -> int:
        """Of the policy that samples for a step."""
        return max(0, step - self.max_staleness)

    def due(self, step: int) -> range:
        """The steps whose rollouts are asked for when `step` begins: the policy is then of exactly the version they need."""
        return range(self.asked, min(step + self.max_staleness + 1, self.steps))

    def ask(self, step: int, generate: Callable[[int, int], list[Shard]]) -> list[Shard]:
        """Asks for what is due, by `generate(step, version)`; returns the new shards, in the order in which they will be sampled."""
        due = self.due(step)
        for ahead in due:
            self.pending[ahead] = generate(ahead, self.version(ahead))
        self.asked = max(self.asked, due.stop)
        return [shard for ahead in due for shard in self.pending[ahead]]

    def shards(self) -> list[Shard]:
        """All that are pending, in the order in which they are sampled."""
        return [shard for step in sorted(self.pending) for shard in self.pending[step]]

    def done(self, step: int) -> None:
        """The shards of a step were trained on, and are pending no longer."""
        del self.pending[step]

    def kept(self, step: int) -> dict[int, list[Shard]]:
        """What a checkpoint before `step` must hold: shards of policies that are gone by then. Others can be sampled again (law 9)."""
        return {ahead: shards for ahead, shards in sorted(self.pending.items()) if self.version(ahead) < step}

    def restore(self, step: int, kept: dict[int, list[Shard]]) -> None:
        """Goes on before `step` with what `kept` gave."""
        self.pending = dict(kept)
        self.asked = max([step, *(ahead + 1 for ahead in kept)])

    def staleness(self, step: int, shards: Sequence[Shard]) -> Tally:
        """How many versions behind the policy each sample of a step is, as a mean and a maximum over samples.

        Raises:
            UserError: a sample of another version than the schedule says.
        """
        versions = [version for shard in shards if shard.info is not None for version in shard.info.versions]
        if set(versions) - {self.version(step)}:
            came = ", ".join(map(str, sorted(set(versions))))
            raise UserError(
                f"samples of policy version {came} came for a step that trains on version {self.version(step)}",
                where=f"step {step + 1}, rollouts (law 8, every sample knows its policy version)",
                fix="the sampler's weights and the schedule have drifted apart: report this with the config",
            )
        tally = Tally()
        for version in versions:
            tally.add("rollout/staleness", step - version, 1)
            tally.peak("rollout/staleness_max", step - version)
        return tally
