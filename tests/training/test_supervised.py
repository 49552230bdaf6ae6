"""The supervised loop over a group that only counts: which rows, which denominators, when it evaluates, what it keeps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.sft import SFTConfig
from rlhf_dist.contracts.engine import SavedFile, StepInfo
from rlhf_dist.contracts.flops import FlopModel
from rlhf_dist.contracts.group import Late, Lost, RankReport
from rlhf_dist.contracts.roles import UpdateInfo, UpdateRequest
from rlhf_dist.contracts.supervised import RowFacts
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.runs.checkpoints import hash_of
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


class Mortal(Counting):
    """Saves how many updates it has taken, which its loss shows. failures: before the n-th update that it is asked for, this is raised."""

    def __init__(self, failures: dict[int, Lost]) -> None:
        super().__init__(8, [])
        self.taken, self.asked, self.failures, self.rebuilt, self.loaded = 0, 0, failures, 0, [""]
        self.path: Path | None = None
        self.slow = self.still_there = False

    def update(self, requests: list[UpdateRequest]) -> list[UpdateInfo]:
        self.asked += 1
        if self.asked in self.failures:
            raise self.failures[self.asked]
        self.taken += 1
        self.updates.append(requests)
        tally = Tally()
        tally.add("loss", float(self.taken), 1.0)
        return [UpdateInfo(tally, StepInfo(0.5, 0.1), 0.0)] * 2

    def begin_save(self, folders: list[str]) -> list[None]:
        self.path = Path(folders[0]) / "taken"
        self.path.parent.mkdir()
        self.path.write_text(str(self.taken))
        return [None, None]

    def saved(self, waits: list[bool]) -> list[tuple[SavedFile, ...] | None]:
        if self.slow:
            return [None, ()]
        assert self.path is not None
        return [(SavedFile("taken", self.path.stat().st_size, hash_of(self.path)),), ()]

    def load_state(self, folders: list[str]) -> list[None]:
        self.loaded.append(Path(folders[0]).parent.name)
        self.taken = int((Path(folders[0]) / "taken").read_text())
        return [None, None]

    def begin_rebuild(self) -> None:
        self.still_there = self.path is not None and self.path.exists()
        self.taken = 0
        self.rebuilt += 1

    def finish_start(self) -> None:
        if "while it loads" in self.failures and self.rebuilt == 1:  # type: ignore[comparison-overlap]
            raise Lost("died while it loaded", where="model rank 0")

    def alive(self) -> bool:
        return True

    def intact(self, handles: Any) -> bool:
        return True

    def census(self) -> list[RankReport]:
        return [RankReport(0, True, "here", "update", 1, 1.0, "stack of rank 0"), RankReport(1, False)]

    def close(self) -> None:
        pass


DEAD, STUCK = Lost("a worker process died", where="model rank 1, update"), Late("no answer within 1 s", where="model rank 0, update")


def loop_of(
    folder: RunFolder,
    group: Mortal,
    said: list[str],
    restarts: int = 3,
    every: int = 2,
    asynchronous: bool = False,
    capsules: int = 2,
    **options: Any,
) -> tuple[SupervisedLoop, Recorder]:
    class Said(NullReporter):
        def message(self, text: str) -> None:
            said.append(text)

    values = {"data": {"train": "x"}, "model": {"model": "m"}, "training": {"batch_size": 2, "epochs": 2, "capsules": capsules}}
    values |= {"checkpoint": {"every": every, "asynchronous": asynchronous}, "placement": {"restarts": restarts}}
    recorder = Recorder(folder)
    stage = Stage("sft", "eval/loss")
    return SupervisedLoop(stage, SFTConfig.model_validate(values), group, recorder, Said(), **options), recorder  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "run")


def losses(folder: RunFolder) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder.metrics)]


WHOLE = [(step, float(step)) for step in range(1, 9)]


@pytest.mark.parametrize(("dies_at", "from_step"), [(1, ""), (2, ""), (3, "step_000002"), (6, "step_000004"), (8, "step_000006")])
def test_a_death_goes_back_to_the_last_checkpoint_and_every_step_stands_once(folder: RunFolder, dies_at: int, from_step: str) -> None:
    group, said = Mortal({dies_at: DEAD}), []  # type: ignore[var-annotated]
    summary = loop_of(folder, group, said)[0].run()
    assert losses(folder) == WHOLE and summary["steps"] == 8 and group.rebuilt == 1
    assert group.loaded[-1] == from_step
    assert said[0] == f"recovering in step {dies_at}, train: a worker process died (model rank 1, update)"
    rows = [[cut for request in requests for cut in request.microbatches] for requests in group.updates]
    other = Mortal({})
    loop_of(RunFolder.create(folder.root.parent, "calm"), other, [])[0].run()
    assert rows[-1] == [cut for request in other.updates[-1] for cut in request.microbatches]


def test_a_stuck_group_is_reported_and_one_that_dies_while_it_loads_is_started_again(folder: RunFolder) -> None:
    group, said = Mortal({3: STUCK, "while it loads": DEAD}), []  # type: ignore[dict-item,var-annotated]
    loop_of(folder, group, said)[0].run()
    assert losses(folder) == WHOLE and group.rebuilt == 2
    (report,) = folder.reports.iterdir()
    text = report.read_text()
    assert all(part in text for part in ("no answer within 1 s", "step 3, train", "stack of rank 0", "rank 1", "NO SIGN OF LIFE"))
    assert any(str(report) in each for each in said)


def test_what_is_half_written_goes_when_its_writers_have(folder: RunFolder) -> None:
    """A rank that lives on writes until it is ended: its folder must not be removed under it."""
    group = Mortal({3: DEAD})
    group.slow = True
    loop, recorder = loop_of(folder, group, [], asynchronous=True)
    recorder.rewind(-1, 0)
    begin = group.begin_rebuild

    def rebuilt() -> None:
        begin()
        group.slow = False

    group.begin_rebuild = rebuilt  # type: ignore[method-assign]
    loop.run()
    assert group.still_there and group.loaded == [""] and losses(folder) == WHOLE
    assert not list(folder.checkpoints.glob(".*"))


def test_restarts_that_do_not_get_further_are_bounded(folder: RunFolder) -> None:
    group, said = Mortal({asked: DEAD for asked in range(3, 50)}), []  # type: ignore[var-annotated]
    with pytest.raises(UserError, match="2 recoveries did not get the run past step 2") as caught:
        loop_of(folder, group, said, restarts=2)[0].run()
    assert "run.resume=auto" in caught.value.fix and group.rebuilt == 2
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step_000002"], "its state is saved"


def test_deaths_between_which_it_gets_further_are_forgiven(folder: RunFolder) -> None:
    group = Mortal({asked: DEAD for asked in (3, 6, 9)})
    loop_of(folder, group, [], restarts=1)[0].run()
    assert losses(folder) == WHOLE and group.rebuilt == 3


@pytest.mark.parametrize("every", [0, 2])
def test_one_that_is_asked_to_stop_saves_and_goes_on_later(folder: RunFolder, every: int) -> None:
    group: Mortal = Mortal({})
    loop, _ = loop_of(folder, group, [], every=every, stopping=lambda: group.taken == 5)
    assert loop.run() == {"stopped": 5} and losses(folder) == WHOLE[:5] and not folder.summary.exists()
    later, said = Mortal({}), []  # type: ignore[var-annotated]
    recorder = Recorder(folder)
    checkpoint = recorder.newest_checkpoint(said.append)
    recorder.close()
    assert checkpoint is not None and checkpoint.step == 5
    loop_of(folder, later, said, resume=checkpoint)[0].run()
    assert losses(folder) == WHOLE and len(later.updates) == 3 and "resumed after step 5" in said[0]


class Skipping(Mortal):
    """Skips some updates, by number, and writes a capsule where it may; fp16's search for a loss scale is no alarm."""

    def __init__(self, skipped: dict[int, bool], unsound: int = 0, failures: dict[int, Lost] | None = None) -> None:
        super().__init__(failures or {})
        self.skips, self.spoilt = skipped, unsound

    def update(self, requests: list[UpdateRequest]) -> list[UpdateInfo]:
        info = super().update(requests)[0]
        assert len({(request.capsule, request.capsules) for request in requests}) == 1
        if self.taken in self.skips:
            overflow, folder = self.skips[self.taken], Path(requests[0].capsule)
            written = not overflow and requests[0].capsules > 0
            if written:
                folder.mkdir(parents=True)
            step = StepInfo(math.nan, 0.1, True, overflow)
            return [UpdateInfo(Tally(), step, 0.0, "" if overflow else "loss", str(folder) if written else "")] * 2
        return [dataclasses.replace(info, unsound="head.weight" if self.taken == self.spoilt else "")] * 2


def test_steps_that_are_skipped_are_counted_and_three_in_a_row_stop_the_run_with_its_state_saved(tmp_path: Path) -> None:
    _, lines = run(tmp_path / "some", Skipping({1: False, 2: False, 4: False, 5: True, 6: True, 7: True}), epochs=4)
    assert [line["skipped_steps"] for line in lines] == [1, 1, 0, 1, 1, 1, 1, 0]
    assert ["grad_norm" in line for line in lines] == ["loss" in line for line in lines] == [line["skipped_steps"] == 0 for line in lines]
    with pytest.raises(UserError, match="3 optimizer steps in a row were skipped") as caught:
        run(tmp_path / "many", Skipping({3: False, 4: False, 5: False}), epochs=4)
    assert caught.value.where == "step 5 (training.max_skipped 3)"
    assert f"`rlhf-dist replay {tmp_path / 'many' / 'run' / 'capsules' / 'step_000004_model_01'}`" in caught.value.fix
    assert [path.name for path in (tmp_path / "many" / "run" / "checkpoints").iterdir()] == ["step_000005"]


def capsules_of(folder: RunFolder) -> list[int]:
    return sorted(int(path.name.removeprefix("step_").removesuffix("_model_01")) for path in folder.capsules.glob("*"))


def test_so_many_skipped_steps_are_written_down_and_said(folder: RunFolder) -> None:
    said: list[str] = []
    loop_of(folder, Skipping({2: False, 3: True, 5: False, 7: False}), said)[0].run()
    assert capsules_of(folder) == [2, 5]
    place = folder.capsules / "step_000002_model_01"
    assert said[:2] == ["step 2 skipped: the loss was not finite", f"capsule: {place}"]
    assert said[2].startswith("step 5") and said[4:] == ["step 7 skipped: the loss was not finite"]


def test_one_that_dies_forgets_the_capsules_of_later_steps_and_writes_the_same_again(folder: RunFolder) -> None:
    """The first capsule is saved, the second is not; in the end there are those of a calm run, and no third."""
    skipped = {2: False, 3: False, 5: False, 7: False}
    group = Skipping(skipped, failures={4: DEAD})
    loop, _ = loop_of(folder, group, [])
    begin = group.begin_rebuild

    def rebuilt() -> None:
        assert capsules_of(folder) == [2, 3]
        begin()

    group.begin_rebuild = rebuilt  # type: ignore[method-assign]
    loop.run()
    assert group.rebuilt == 1 and group.loaded[-1] == "step_000002" and capsules_of(folder) == [2, 3]


@pytest.mark.parametrize("most", [0, 1, 3])
def test_a_resumed_run_writes_what_an_undisturbed_one_would_have(folder: RunFolder, most: int) -> None:
    skipped = {2: False, 4: False, 6: False}
    group = Skipping(skipped)
    assert loop_of(folder, group, [], capsules=most, stopping=lambda: group.taken == 4)[0].run() == {"stopped": 4}
    (folder.capsules / "step_000005_model_01").mkdir(parents=True)  # of steps that were not saved
    recorder = Recorder(folder)
    checkpoint = recorder.newest_checkpoint(lambda text: None)
    recorder.close()
    loop_of(folder, Skipping(skipped), [], capsules=most, resume=checkpoint)[0].run()
    assert capsules_of(folder) == [2, 4, 6][:most]


def test_weights_that_are_not_finite_end_the_run_and_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the weight head\.weight is not finite after an optimizer step") as caught:
        run(tmp_path, Skipping({}, unsound=3), epochs=4)
    assert caught.value.where == "step 3, train" and "nothing was saved yet" in caught.value.fix
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
