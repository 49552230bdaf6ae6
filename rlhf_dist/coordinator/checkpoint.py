"""What a PPO run must not lose: its engines, the rollouts whose policy will be gone, and the coordinator's own state."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_dist.config.operation import CheckpointSection
from rlhf_dist.contracts.engine import SavedFile
from rlhf_dist.contracts.roles import PolicyRole, TrainedRole
from rlhf_dist.coordinator.pipeline import Pipeline
from rlhf_dist.coordinator.shards import Groups, Shard, collect_rollouts, cut_prompts
from rlhf_dist.runs.checkpoints import Checkpoint
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.runs.saver import Saver
from rlhf_dist.runs.state import RunState

PENDING = "pending"


def export(groups: Groups, folder_of: Callable[[str], str]) -> None:
    """Writes policy and value as Hugging Face folders, side by side where the groups are processes of their own and do not take turns.

    Args:
        groups: the run's workers.
        folder_of: the folder of a role; what it gives on ranks that write nothing is not used.
    """
    asked = []
    for group in groups.trained():
        groups.turn(group)
        asked.append((group, group.submit(TrainedRole.export, [(folder_of(group.name),)] * group.world_size)))
    for group, handles in asked:
        group.collect(handles)


class Checkpointer(Saver):
    """Saves and restores a PPO run.

    Args:
        section: how many are kept, and whether training waits for the files.
        groups: the run's workers.
        recorder: owns the folder.
    """

    def __init__(self, section: CheckpointSection, groups: Groups, recorder: Recorder) -> None:
        super().__init__(section, groups.trained(), recorder, lambda group: groups.turn(group, needs="training"))
        self._all = groups

    def save(self, state: RunState, pipeline: Pipeline) -> None:
        """Takes a checkpoint of the run before step `state.step` (see `Saver.begin`)."""
        pending = pipeline.kept(state.step)
        state.pending = {str(step): len(shards) for step, shards in pending.items()}
        state.metrics_bytes = self._recorder.metrics_position
        self.begin(state.step, state.to_dict(), lambda folder: self._save_rollouts(folder, pending))

    def restore(self, checkpoint: Checkpoint, state: RunState, pipeline: Pipeline) -> None:
        """Gives the engines what the checkpoint holds, and the pipeline its pending rollouts.

        Args:
            checkpoint: whole.
            state: of the checkpoint.
            pipeline: as new.

        Raises:
            UserError: the files are of other models, or damaged.
        """
        self.load(checkpoint)
        pipeline.restore(state.step, {int(step): self._load_rollouts(checkpoint, step, n) for step, n in state.pending.items()})

    def _save_rollouts(self, folder: str, pending: dict[int, list[Shard]]) -> list[SavedFile]:
        policy, written = self._all.policy, []
        for step, shards in pending.items():
            collect_rollouts(self._all.sampler, shards)
            given = (f"{folder}/{PENDING}/{step}", [shard.rollouts for shard in shards], [shard.info for shard in shards])
            for files in policy.collect(policy.submit(PolicyRole.save_rollouts, [given] * policy.world_size)):
                written += [SavedFile(f"{PENDING}/{step}/{file.name}", file.bytes, file.sha256) for file in files]
        return written

    def _load_rollouts(self, checkpoint: Checkpoint, step: str, count: int) -> list[Shard]:
        """Contiguous runs of shards go to each rank, as they are estimated later."""
        policy, folder = self._all.policy, f"{checkpoint.folder}/{PENDING}/{step}"
        runs = cut_prompts(0, count, policy.world_size)
        rank_of = [rank for rank, (_, size) in enumerate(runs) for _ in range(size)]
        shards = []
        for number, owner in enumerate(rank_of):
            given = [(folder, number) if rank == owner else None for rank in range(policy.world_size)]
            shards += [Shard(handle, step=int(step)) for handle in policy.submit(PolicyRole.load_rollouts, given)]
        return shards
