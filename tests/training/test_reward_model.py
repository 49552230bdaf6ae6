"""The reward stage's report: who is judged, what the summary says, and what is said where there is nothing to report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.contracts.supervised import RowFacts
from rlhf_dist.evaluation.judged import JudgedPair
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.training import reward_model
from rlhf_dist.training.reward_model import REWARD, report
from rlhf_dist.training.supervised import Setting


class Judging:
    """Two ranks; on rows the model has seen it is always right, on others two times in three."""

    name, world_size = "model", 2

    def __init__(self, probability: float | None = None) -> None:
        self.probability = probability
        self.asked: dict[str, list[int]] = {"train": [], "eval": []}

    def submit(self, method: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        assert method.__name__ == "judge" and len(arguments) == 2
        return [self.judge(*given) for given in arguments]

    def collect(self, handles: Sequence[Any]) -> list[Any]:
        return list(handles)

    def judge(self, side: str, microbatches: Sequence[Sequence[int]]) -> tuple[JudgedPair, ...]:
        rows = [row for rows in microbatches for row in rows]
        self.asked[side] += rows
        wrong = {row for row in rows if side == "eval" and row % 3 == 0}
        return tuple(JudgedPair(-1.0 if row in wrong else 1.0, 0.0, 5, 3, "s", None, row, self.probability) for row in rows)


FATES = {"dropped: too long": 5, "dropped: odd": 2}


def setting(group: Judging, folder: RunFolder | None, train: int = 30, held_out: int = 30) -> Setting:
    facts = RowFacts((8,) * train, (1.0,) * train, (8,) * held_out, FATES, {}, {"dropped: too long": 4} if held_out else {})
    return Setting(group, facts, 64, Recorder(folder))  # type: ignore[arg-type]


def test_held_out_rows_and_a_sample_of_the_training_rows_are_judged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_model, "TRAIN_SAMPLE", 20)
    group, again = Judging(), Judging()
    folder = RunFolder.create(tmp_path, "run")
    said = report(setting(group, folder))["report"]
    report(setting(again, None))
    assert sorted(group.asked["eval"]) == list(range(30))
    assert len(set(group.asked["train"])) == 20 == len(group.asked["train"]) and group.asked == again.asked, "the same sample each time"
    assert said["accuracy"]["mean"] == pytest.approx(2 / 3) and said["train_accuracy"]["mean"] == 1.0
    assert said["gap"]["mean"] == pytest.approx(1 / 3) and said["pairs"] == 30
    assert said["baselines"]["longer answer wins"]["mean"] == 1.0 == said["baselines"][said["best_baseline"]]["mean"]
    assert 0.0 <= said["ece"] <= 1.0 and said["facts"][0]["name"] == "Accuracy, held out"
    json.dumps(said, allow_nan=False)


def test_the_files_lie_in_the_run_folder_with_what_befell_each_side(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run")
    said = report(setting(Judging(), folder))["report"]
    assert (folder.root / said["page"]).is_file() and (folder.root / said["page"]).parent == folder.report
    written = json.loads((folder.report / "report.json").read_text())
    assert written["held_out"]["fates"] == {"dropped: too long": 4}
    assert written["train"]["fates"] == {"dropped: too long": 1, "dropped: odd": 2}


def test_a_rank_without_the_folder_judges_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = report(setting(Judging(), None))["report"]
    assert "page" not in said and said["pairs"] == 30 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("held_out", "probability", "why"), [(0, None, "no held-out rows: set data.eval or data.eval_fraction"), (4, 0.5, "labelled as ties")]
)
def test_where_there_is_nothing_to_report_it_says_so(tmp_path: Path, held_out: int, probability: float | None, why: str) -> None:
    folder = RunFolder.create(tmp_path, "run")
    said = report(setting(Judging(probability), folder, held_out=held_out))
    assert set(said["report"]) == {"none"} and why in said["report"]["none"] and not folder.report.exists()


def test_held_out_rows_that_were_all_dropped_are_said_to_be() -> None:
    facts = RowFacts((8,), (1.0,), (), {"dropped: longer than data.max_tokens": 3}, {}, {"dropped: longer than data.max_tokens": 1})
    said = report(Setting(Judging(), facts, 64, Recorder(None)))  # type: ignore[arg-type]
    assert said == {"report": {"none": "all held-out rows were dropped: 1 longer than data.max_tokens"}}


def test_the_stage_wants_a_small_loss() -> None:
    assert REWARD.score == "eval/loss" and not REWARD.more_is_better
