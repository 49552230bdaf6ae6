"""An optimizer step on an engine that only answers: which fault it is, and what is written down of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_dist.contracts.engine import StepInfo
from rlhf_dist.contracts.roles import UpdateRequest
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.runs.capsule import Facts, Part
from rlhf_dist.workers.steps import Steps

GOOD, SKIPPED, OVERFLOW = StepInfo(1.0, 0.1), StepInfo(math.nan, 0.1, True), StepInfo(math.nan, 0.1, True, True)
CUTS = [(7, 2), (5,), (1, 0, 3)]


class Answering:
    """One rank of several. elsewhere: what other ranks say when they are asked, in turn."""

    def __init__(self, info: StepInfo, elsewhere: Sequence[bool] = (), unsound: str = "") -> None:
        self.info, self.elsewhere, self.unsound, self.asked = info, list(elsewhere), unsound, 0

    def forward_backward(self, microbatches: Sequence[float], objective: Any, denominator: float) -> Tally:
        for each in microbatches:
            objective({}, each)
        return Tally()

    def optimizer_step(self) -> StepInfo:
        return self.info

    def unsound_weights(self) -> str:
        return self.unsound

    def any_rank(self, mine: bool) -> bool:
        self.asked += 1
        theirs = bool(self.elsewhere and self.elsewhere.pop(0))
        return mine or theirs


class Kept:
    """Remembers what it was asked to write."""

    stage = "sft"

    def __init__(self) -> None:
        self.written: list[tuple[Path, Facts, Part, Any]] = []

    def write(self, *given: Any) -> str:
        self.written.append(given)
        return str(given[0])


def looked(engine: Answering, losses: Sequence[float], kept: Kept | None, times: int = 1, **request: Any) -> list[tuple[str, str]]:
    steps = Steps(engine, lambda outputs, loss: (torch.tensor(loss), Tally()), "model", kept)  # type: ignore[arg-type]
    seen = []
    for _ in range(times):
        taken = steps.take(losses, 4.0)
        assert taken.losses == pytest.approx(tuple(losses), nan_ok=True) and taken.info is engine.info
        given: dict[str, Any] = {"capsule": "/run/one", "capsules": 2} | request
        asked = UpdateRequest(tuple(CUTS), 4.0, **given)
        seen.append(steps.look(asked, taken, CUTS, lambda rows: [f"row {row}" for row in rows]))  # type: ignore[arg-type,misc,return-value]
    return seen  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("info", "losses", "elsewhere", "fault"),
    [
        (GOOD, (1.0, 2.0, 3.0), [], ""),
        (SKIPPED, (1.0, math.inf, 3.0), [], "loss"),
        (SKIPPED, (1.0, 2.0, 3.0), [True], "loss"),
        (SKIPPED, (1.0, 2.0, 3.0), [], "gradient"),
        (OVERFLOW, (1.0, 2.0, 3.0), [], ""),
        (OVERFLOW, (1.0, math.nan, 3.0), [], "loss"),
    ],
)
def test_what_was_not_finite_on_any_rank(info: StepInfo, losses: Any, elsewhere: list[bool], fault: str) -> None:
    engine, kept = Answering(info, elsewhere), Kept()
    assert looked(engine, losses, kept) == [(fault, "/run/one" if fault else "")]
    assert len(kept.written) == bool(fault) and (engine.asked == 0) == (info is GOOD), "no collective where nothing was skipped"


def test_rows_are_written_one_after_the_other_with_the_places_of_each_microbatch() -> None:
    kept = Kept()
    looked(Answering(SKIPPED), (1.0, math.inf, 3.0), kept)
    ((folder, facts, part, rows),) = kept.written
    assert folder == Path("/run/one") and (facts.stage, facts.role, facts.fault, facts.denominator) == ("sft", "model", "loss", 4.0)
    assert part == Part(((0, 1), (2,), (3, 4, 5)), (1.0, math.inf, 3.0)) and rows == [f"row {row}" for row in (7, 2, 5, 1, 0, 3)]


@pytest.mark.parametrize("request_", [{"capsule": ""}, {"capsules": 0}])
def test_nothing_is_written_where_it_is_not_asked_for(request_: dict[str, Any]) -> None:
    kept = Kept()
    assert looked(Answering(SKIPPED), (math.nan,) * 3, kept, **request_) == [("loss", "")] and kept.written == []
    assert looked(Answering(SKIPPED), (math.nan,) * 3, None) == [("loss", "")]


def test_no_more_are_written_than_were_left_at_the_beginning_nor_of_weights_that_are_not_finite() -> None:
    assert [folder for _, folder in looked(Answering(SKIPPED), (math.nan,) * 3, Kept(), times=3)] == ["/run/one", "/run/one", ""]
    assert looked(Answering(SKIPPED, unsound="head"), (math.nan,) * 3, Kept()) == [("loss", "")]
    assert looked(Answering(SKIPPED, [False, True]), (math.nan,) * 3, Kept()) == [("loss", "")], "unsound elsewhere"
