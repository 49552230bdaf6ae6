"""The supervised loop over a group that only counts: which rows, which denominators, when it evaluates, what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.sft import SFTConfig
from rlhf_dist.contracts.engine import StepInfo
from rlhf_dist.contracts.flops import FlopModel
from rlhf_dist.contracts.roles import UpdateInfo, UpdateRequest
from rlhf_dist.contracts.supervised import RowFacts
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.metrics import read_metrics
from rlhf_dist.runs.progress import NullReporter
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.training.supervised import Stage, SupervisedLoop


class Counting:
    """Two ranks that remember what they were asked; the held-out loss follows a script."""

    name, world_size = "model", 2

    def __init__(self, rows: int, eval_losses: Sequence[float]) -> None:
        self.rows, self.eval_losses, self.eval_rows = rows, list(eval_losses), (3, 4) if eval_losses else ()
        self.updates: list[list[UpdateRequest]] = []
        self.exports: list[str] = []

    def submit(self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        assert len(arguments) == 2
        return getattr(self, method.__name__)([given[0] if given else None for given in arguments])  # type: ignore[no-any-return]

    def collect(self, handles: Sequence[Any]) -> list[Any]:
        return list(handles)

    def describe(self, _: Any) -> list[RowFacts]:
        return [RowFacts(tuple(range(1, self.rows + 1)), (2.0,) * self.rows, self.eval_rows, {"dropped: odd": 1}, {"parameters": 5})] * 2

    def update(self, requests: list[UpdateRequest]) -> list[UpdateInfo]:
        self.updates.append(requests)
        tally = Tally()
        tally.add("loss", 1.0, 1.0)
        return [UpdateInfo(tally, StepInfo(0.5, 0.1), 0.0)] * 2

    def evaluate(self, shares: Any) -> list[Tally]:
        tally = Tally()
        tally.add("loss", self.eval_losses.pop(0), 1.0)
        return [tally, Tally()]

    def export(self, folders: list[str]) -> list[None]:
        self.exports.append(Path(folders[0]).name)
        return [None, None]


def run(
    tmp_path: Path, group: Counting, model: dict[str, Any] | None = None, **training: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    values = {"data": {"train": "x"}, "model": {"model": "m"} | (model or {}), "training": {"batch_size": 4} | training}
    config = SFTConfig.model_validate(values)
    folder = RunFolder.create(tmp_path, "run")
    loop = SupervisedLoop(Stage("sft", "eval/loss"), config, group, Recorder(folder), NullReporter())  # type: ignore[arg-type]
    return loop.run(), read_metrics(folder.metrics)


def test_every_row_once_an_epoch_with_its_global_denominator(tmp_path: Path) -> None:
    group = Counting(10, [1.0] * 3)
    summary, lines = run(tmp_path, group, epochs=2)
    assert summary["steps"] == 6 == len(group.updates) and len(lines) == 7
    for epoch in (group.updates[:3], group.updates[3:]):
        rows = [row for requests in epoch for request in requests for cut in request.microbatches for row in cut]
        assert sorted(rows) == list(range(10))
    for requests in group.updates:
        count = sum(len(cut) for request in requests for cut in request.microbatches)
        assert {request.denominator for request in requests} == {2.0 * count}
        assert len({len(request.microbatches) for request in requests}) == 1
    assert [set(requests[0].microbatches[0]) for requests in group.updates[:3]] != [
        set(requests[0].microbatches[0]) for requests in group.updates[3:]
    ]


def test_it_evaluates_before_at_intervals_and_at_the_end_and_keeps_the_best(tmp_path: Path) -> None:
    group = Counting(8, [5.0, 4.0, 3.0, 3.5])
    summary, lines = run(tmp_path, group, epochs=3)
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 2, 4, 6]
    assert (summary["best_step"], summary["before"], summary["after"]) == (4, {"eval/loss": 5.0}, {"eval/loss": 3.5})
    assert group.exports == ["best", "best", "model"] and summary["best"] == "export/best"


def test_without_held_out_rows_there_is_nothing_to_say_before_the_first_step(tmp_path: Path) -> None:
    summary, lines = run(tmp_path, Counting(8, []), epochs=2)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all("loss" in line for line in lines)
    assert (summary["before"], summary["after"], summary["best_step"]) == (None, None, None)


def test_max_steps_and_evaluate_every(tmp_path: Path) -> None:
    group = Counting(8, [5.0] * 4)
    summary, lines = run(tmp_path, group, epochs=3, max_steps=5, evaluate_every=2)
    assert summary["steps"] == 5 and [line["step"] for line in lines if "eval/loss" in line] == [0, 2, 4, 5]
    assert group.exports == ["model"], "it never got better than before"
    assert summary["best_step"] == 0 and "there is no export/best" in summary["best"]


def test_no_rows_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no row is left") as caught:
        run(tmp_path, Counting(0, []))
    assert caught.value.what == "no row is left to train on: all rows were dropped: 1 odd"


def test_rows_that_were_lost_are_counted_on_their_own_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost, held_out = {"dropped: long": 260, "dropped: odd": 1}, {"dropped: long": 60}
    monkeypatch.setattr(Counting, "describe", lambda *_: [RowFacts((), (), (), lost, {}, held_out)] * 2)
    with pytest.raises(UserError, match="all rows were dropped: 200 long, 1 odd\n"):
        run(tmp_path, Counting(0, []))


def test_held_out_rows_that_were_all_dropped_are_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(NullReporter, "message", lambda _, text: said.append(text))
    monkeypatch.setattr(
        Counting, "describe", lambda *_: [RowFacts((3,) * 8, (1.0,) * 8, (), {"dropped: long": 6}, {}, {"dropped: long": 6})] * 2
    )
    run(tmp_path, Counting(8, []))
    assert said == ["nothing will be evaluated: all held-out rows were dropped: 6 long"]


@pytest.mark.parametrize("packing", [False, True])
def test_the_budget_counts_no_padding_where_rows_are_packed(tmp_path: Path, packing: bool) -> None:
    """Rows of 1 to 8 tokens on two ranks, 18 tokens each: 8 + 7 + 2 + 1 and 6 + 5 + 4 + 3."""
    group = Counting(8, [5.0] * 2)
    run(tmp_path, group, {"packing": packing, "microbatch_tokens": 20}, batch_size=8)
    cuts = [[row + 1 for row in cut] for request in group.updates[0] for cut in request.microbatches]
    assert sorted(length for cut in cuts for length in cut) == list(range(1, 9))
    assert (len(cuts) == 2) == packing, "one microbatch a rank"


def test_ranks_get_like_work_by_what_the_rows_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where attention costs s² beside s, shares of even tokens would be 210 and 300."""
    lengths, found = (12, 8, 5, 3, 9, 2, 8, 8), []
    for costs in (None, FlopModel(2.0, 2.0)):
        facts = RowFacts(lengths, (1.0,) * 8, (), costs=costs)
        monkeypatch.setattr(Counting, "describe", lambda *_, facts=facts: [facts] * 2)
        group = Counting(8, [])
        run(tmp_path / str(costs), group, batch_size=8)
        rows = [[row for cut in request.microbatches for row in cut] for request in group.updates[0]]
        found.append(sorted(sum(lengths[row] + lengths[row] ** 2 for row in share) for share in rows))
    assert found == [[210, 300], [252, 258]]
