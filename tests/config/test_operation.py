"""`placement`, `evaluation`, `checkpoint`: every wait has an end, every count is positive."""

import pytest
from pydantic import ValidationError

from rlhf_dist.config.operation import CheckpointSection, EvaluationSection, PlacementSection, PPOPlacementSection


def test_defaults():
    assert PlacementSection().launcher == "ray" and PlacementSection().threads_per_rank == 1
    assert PPOPlacementSection().offload == "none"
    assert EvaluationSection().samples_per_prompt == 1 and EvaluationSection().max_prompts is None
    assert CheckpointSection().every == 10 and CheckpointSection().asynchronous


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (PlacementSection, {"launcher": "slurm"}),
        (PlacementSection, {"strategy": "pack"}),
        (PlacementSection, {"start_timeout_s": 0}),
        (PlacementSection, {"call_timeout_s": -1}),
        (PlacementSection, {"threads_per_rank": 0}),
        (PlacementSection, {"offload": "idle"}),  # of PPO alone: the other stages have one engine, which is never idle
        (PPOPlacementSection, {"offload": "always"}),
        (EvaluationSection, {"every": -1}),
        (EvaluationSection, {"samples_per_prompt": 0}),
        (EvaluationSection, {"max_prompts": 0}),
        (CheckpointSection, {"every": -1}),
        (CheckpointSection, {"keep": 0}),
    ],
)
def test_ranges(kind, changes):
    with pytest.raises(ValidationError, match=next(iter(changes))):
        kind(**changes)
