"""What a replay says of what it found, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.runs.capsule import Capsule, Facts
from rlhf_dist.workers.replay import MicrobatchLoss, Replay, replay


def test_losses_are_the_same_up_to_rounding_or_both_not_finite() -> None:
    def same(recorded: float, now: float) -> bool:
        return Replay(1.0, "fp32", microbatches=[MicrobatchLoss(0, 1, recorded, now, 10.0)]).reproduced

    assert same(1e-7, 1e-6) and same(math.nan, math.inf) and same(2.0, 2.0)
    assert not same(1.0, 1.001) and not same(math.nan, 1.0) and not same(1.0, math.nan)


@pytest.mark.parametrize(("stage", "role"), [("ppo", "referee"), ("tuning", "model")])
def test_what_nobody_here_trains_is_refused(stage: str, role: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"'{role}' of the stage '{stage}'") as refused:
        replay(Capsule(tmp_path, Facts(stage, role, "loss", 1.0, 1.0, 0.1), ()))
    assert refused.value.where == str(tmp_path)
