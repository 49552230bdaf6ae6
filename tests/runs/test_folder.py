from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.runs.folder import RunFolder


def test_a_new_folder_has_its_places(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "runs", "ppo", overwrite=False)
    root = tmp_path / "runs" / "ppo"
    assert folder.root == root
    assert folder.rollouts_path(1) == root / "rollouts" / "step_000001.parquet"
    assert folder.evaluation_path(12) == root / "evaluation" / "step_000012.parquet"
    assert (folder.config, folder.metrics, folder.summary) == (root / "config.yaml", root / "metrics.jsonl", root / "summary.json")
    assert (folder.export_policy, folder.export_value) == (root / "export" / "policy", root / "export" / "value")
    assert folder.report == root / "report" and not folder.report.exists(), "made by what has something to report"
    for place in (folder.tensorboard, folder.rollouts, folder.evaluation, folder.checkpoints, folder.export):
        assert place.is_dir() and place.parent == root


def test_the_root_is_absolute_for_workers_that_stand_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunFolder.create("runs", "a").root == tmp_path / "runs" / "a"


def test_an_existing_run_is_kept_unless_told(tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path, "a")
    first.write_config("run: {}\n")
    with pytest.raises(UserError, match="not empty") as error:
        RunFolder.create(tmp_path, "a")
    assert "run.overwrite=true" in str(error.value)
    assert first.config.read_text() == "run: {}\n"


def test_overwrite_empties_a_run_folder(tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path, "a")
    first.write_config("old")
    first.rollouts_path(1).write_text("old")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    (first.root / "link").symlink_to(outside)
    second = RunFolder.create(tmp_path, "a", overwrite=True)
    assert not second.config.exists() and not second.rollouts_path(1).exists() and not (second.root / "link").exists()
    assert (outside / "precious").exists()
    RunFolder.create(tmp_path, "a", overwrite=True)


def test_overwrite_leaves_a_foreign_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not made by a run"):
        RunFolder.create(tmp_path, "a", overwrite=True)
    assert (tmp_path / "a" / "thesis.tex").exists()


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert RunFolder.create(tmp_path, "a").checkpoints.is_dir()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp"])
def test_a_name_cannot_leave_the_output_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot name"):
        RunFolder.create(tmp_path, name, overwrite=True)


def test_a_file_in_the_way_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(tmp_path, "a", overwrite=True)
    with pytest.raises(UserError, match="cannot make"):
        RunFolder.create(tmp_path / "a", "b")


def test_open_takes_run_folders_only(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "a")
    assert RunFolder.open(folder.root) == folder
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder.open(tmp_path)


def test_a_run_that_recorded_no_metric_is_cleared(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "a")
    folder.write_config("run: {}")
    folder.metrics.touch()
    folder.evaluation_path(0).write_text("samples")
    assert folder.clear_unused()
    assert folder.root.is_dir() and list(folder.root.iterdir()) == []
    assert not folder.clear_unused()  # no longer a run folder
    RunFolder.create(tmp_path, "a")


def test_a_run_that_recorded_something_is_never_cleared(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "a")
    folder.metrics.write_text('{"step": 0}\n')
    assert not folder.clear_unused()
    assert folder.metrics.is_file()


def test_a_failed_start_keeps_what_tells_why(tmp_path: Path) -> None:
    """A sample in quarantine, what an earlier run left: only what every run makes before it does anything is nothing."""
    for name in ("quarantine.jsonl", "reports/stuck_1.txt", "export/policy/config.json", "rollouts/step_000001.parquet"):
        folder = RunFolder.create(tmp_path, name.split("/")[0])
        folder.metrics.touch()
        (folder.root / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.root / name).write_text("x")
        assert not folder.clear_unused() and (folder.root / name).read_text() == "x"


def test_a_run_that_goes_on_keeps_its_folder(tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path, "a", resume=True)
    first.write_config("run: {}\n")
    assert RunFolder.create(tmp_path, "a", resume=True) == first and first.config.read_text() == "run: {}\n"
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "precious").touch()
    with pytest.raises(UserError, match="not empty"):
        RunFolder.create(tmp_path, "foreign", resume=True)


def test_what_came_after_a_step_is_forgotten(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "a")
    for step in (0, 1, 2, 10):
        folder.rollouts_path(step).touch()
        folder.evaluation_path(step).touch()
    folder.summary.touch()
    (folder.rollouts / "mine.txt").touch()
    folder.forget_after(1)
    assert sorted(path.name for path in folder.rollouts.iterdir()) == ["mine.txt", "step_000000.parquet", "step_000001.parquet"]
    assert len(list(folder.evaluation.iterdir())) == 2 and not folder.summary.exists()
    folder.forget_after(-1)
    assert [path.name for path in folder.rollouts.iterdir()] == ["mine.txt"]


def test_going_back_forgets_the_capsules_of_later_steps(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "a")
    for name in ("step_000002_policy_01", "step_000003_policy_11", "step_000010_value_01"):
        (folder.capsules / name / "model").mkdir(parents=True)
    folder.forget_after(2)
    assert [path.name for path in folder.capsules.iterdir()] == ["step_000002_policy_01"]
