"""Skipped steps of a supervised stage: counted in a row, written down a bounded number of times, and in the end too many."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.config.supervised import TrainingSection
from rlhf_dist.contracts.engine import StepInfo
from rlhf_dist.contracts.roles import NOT_WRITTEN, Fault, UpdateInfo
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.training.skips import Skips

FULL = f"{NOT_WRITTEN} on rank 0: the disk is full"


def info(fault: Fault = "", capsule: str = "", overflow: bool = False) -> UpdateInfo:
    return UpdateInfo(Tally(), StepInfo(math.nan, 0.1, bool(fault) or overflow, overflow), 0.0, fault, capsule)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["", "overflow", "loss", "gradient"]), max_size=15), st.integers(1, 4))
def test_a_run_is_spent_exactly_when_so_many_in_a_row_were_skipped(kinds: list[str], most: int) -> None:
    skips, row = Skips(TrainingSection(max_skipped=most)), 0
    for step, kind in enumerate(kinds, start=1):
        said = skips.note(step, info(overflow=True) if kind == "overflow" else info(kind))  # type: ignore[arg-type]
        row = row if kind == "overflow" else row + 1 if kind else 0
        assert said == ([f"step {step} skipped: the {kind} was not finite"] if kind not in ("", "overflow") else [])
        error = skips.spent(step)
        assert (error is not None) == (row >= most)
        row = 0 if error else row
        assert skips.row == row


def test_capsules_are_bounded_and_the_last_one_is_named_at_the_end() -> None:
    skips = Skips(TrainingSection(max_skipped=2, capsules=2))
    assert skips.left == 2
    assert skips.note(1, info("loss", "/run/capsules/one")) == ["step 1 skipped: the loss was not finite", "capsule: /run/capsules/one"]
    assert skips.left == 1 and skips.note(2, info("loss", FULL))[1] == f"capsule: {FULL}" and skips.left == 0
    error = skips.spent(2)
    assert error is not None and error.fix.startswith("`rlhf-dist replay /run/capsules/one` shows which rows; the state is saved")
    assert error.where == "step 2 (training.max_skipped 2)"
    assert Skips(TrainingSection(capsules=2), capsules=1).left == 1 and Skips(TrainingSection(capsules=0), capsules=1).left == 0


def test_without_a_capsule_none_is_named() -> None:
    skips = Skips(TrainingSection(max_skipped=1))
    skips.note(1, info("gradient", FULL))
    error = skips.spent(1)
    assert error is not None and "replay" not in error.fix and error.fix.startswith("the run's folder capsules/")
