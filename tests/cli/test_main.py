from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from rlhf_dist import __version__
from rlhf_dist.cli import main as entry
from rlhf_dist.cli.interrupts import Interrupted
from rlhf_dist.config.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`verb(error)`: the command line with one verb, `go`, that raises it."""

    def make(error: BaseException | None) -> None:
        app = typer.Typer(pretty_exceptions_enable=False)

        @app.command("go")
        def go(words: list[str] = typer.Argument(default=[])) -> None:  # noqa: B008
            if error is not None:
                raise error
            print("went", *words)

        @app.command("stay")
        def stay() -> None:
            """Two verbs make a group."""

        monkeypatch.setattr(entry, "app", app)

    return make


def test_a_verb_that_ends_well_returns(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    verb(None)
    entry.main(["go", "far"])
    assert capsys.readouterr().out == "went far\n"


def test_the_launchers_rank_argument_is_left_out(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    verb(None)
    entry.main(["--local_rank=1", "go", "a", "--local-rank=0"])
    assert capsys.readouterr().out == "went a\n"


def test_an_error_the_user_can_mend_is_one_block_and_status_2(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    verb(UserError("it [bold]broke[/bold]", where="a.yaml", fix="mend it"))
    with pytest.raises(SystemExit) as ended:
        entry.main(["go"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: it [bold]broke[/bold]\n  where: a.yaml\n  do:    mend it\n"


def test_ranks_of_a_launcher_sign_their_errors(verb: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    verb(UserError("it broke"))
    with pytest.raises(SystemExit):
        entry.main(["go"])
    assert capsys.readouterr().err == "error (rank 1): it broke\n"


def test_ctrl_c_ends_with_130_and_without_a_traceback(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    verb(KeyboardInterrupt())
    with pytest.raises(SystemExit) as ended:
        entry.main(["go"])
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n")


def test_ctrl_c_during_a_run_names_its_folder(verb: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    verb(Interrupted(tmp_path))
    with pytest.raises(SystemExit) as ended:
        entry.main(["go"])
    assert (ended.value.code, capsys.readouterr().err) == (130, f"interrupted; what was recorded until then is in {tmp_path}\n")


def test_of_many_ranks_one_says_that_it_was_interrupted(
    verb: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    for error in (KeyboardInterrupt(), Interrupted(tmp_path)):
        verb(error)
        with pytest.raises(SystemExit) as ended:
            entry.main(["go"])
        assert (ended.value.code, capsys.readouterr().err) == (130, "")


def test_an_error_of_ours_keeps_its_traceback(verb: Any) -> None:
    verb(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        entry.main(["go"])


@pytest.mark.parametrize("arguments", [["fly"], ["ppo"], ["ppo", "--config"], ["config", "show", "--colour", "red"], []])
def test_a_wrong_command_line_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        entry.main(arguments)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert "Usage" in shown.out + shown.err or "requires an arg" in shown.err
    assert "Traceback" not in shown.err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    entry.main(["--help"])
    helped = capsys.readouterr().out
    assert all(verb in helped for verb in ("ppo", "config", "toy", "version"))
    entry.main(["version"])
    assert capsys.readouterr().out.strip() == __version__


def command_line(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "rlhf_dist.cli.main", *arguments], env=environment, cwd=folder, capture_output=True, text=True
    )


def test_a_typo_costs_a_second_in_a_real_process(ppo_values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(ppo_values | {"rolout": {}}))
    began = time.perf_counter()
    done = command_line(["ppo", "--config", "config.yaml"], tmp_path)
    assert time.perf_counter() - began < 20
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the configuration is not valid:\n  - rolout: no such key; did you mean 'rollout'?")
    assert "  where: config.yaml\n  do:    correct the keys above" in done.stderr


@pytest.mark.slow
def test_a_broken_reward_ends_a_real_process_with_one_message(ppo_values: dict[str, Any], reward_file: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(ppo_values))
    done = command_line(["ppo", "--config", "config.yaml", f"reward.sources.0.path={reward_file}:nan"], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: reward 'even' returned nan for row 0") and len(done.stderr.splitlines()) == 3
    assert not (tmp_path / "runs").exists()
