"""The trained models as Hugging Face folders: checkpoints on the way, the export at the end."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_dist.contracts.roles import TrainedRole
from rlhf_dist.coordinator.shards import Groups
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.runs.state import RunState


def export(groups: Groups, folder_of: Callable[[str], str]) -> None:
    """Writes policy and value, side by side where the groups are processes of their own and do not take turns.

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


def checkpoint(groups: Groups, recorder: Recorder, state: RunState, keep: int) -> None:
    """Weights and the coordinator's state after `state.step` steps; the folder counts once it is whole.

    Args:
        keep: checkpoints kept; older ones go.
    """
    folder = recorder.begin_checkpoint(state.step)
    export(groups, lambda role: f"{folder}/{role}")
    recorder.publish_checkpoint(state, keep)
