from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_dist.cli.main import main
from rlhf_dist.config.loading import dump_config, load_config
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.config.sft import SFTConfig


@pytest.fixture
def config_file(ppo_values: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(ppo_values))
    return path


def test_show_prints_the_resolved_config(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "show", "--config", str(config_file), "run.steps=7", "algorithm.kl.coef=1e-3"])
    shown = capsys.readouterr().out
    config = load_config(PPOConfig, config_file, ["run.steps=7", "algorithm.kl.coef=1e-3"])
    assert shown == dump_config(config)
    assert (yaml.safe_load(shown)["run"]["steps"], yaml.safe_load(shown)["algorithm"]["kl"]["coef"]) == (7, 1e-3)
    again = tmp_path / "again.yaml"
    again.write_text(shown)
    assert load_config(PPOConfig, again) == config


def test_validate_looks_at_what_the_config_names(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "validate", "-c", str(config_file)])
    out = capsys.readouterr().out
    assert out.startswith("valid: ") and "rewards even" in out and "stop tokens [2]" in out and "'eval'" in out
    assert not (tmp_path / "runs").exists()  # it starts nothing, and leaves nothing


def test_validate_refuses_what_a_run_would_refuse(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["config", "validate", "-c", str(config_file), "data.train=nowhere.jsonl"])
    assert ended.value.code == 2
    assert "the data file does not exist" in capsys.readouterr().err


def test_show_names_the_nearest_key(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["config", "show", "-c", str(config_file), "algorithm.epoch=3"])
    assert ended.value.code == 2
    assert "algorithm.epoch: no such key; did you mean 'epochs'?" in capsys.readouterr().err


def test_relative_paths_of_a_config_are_checked_where_the_user_stands(
    config_file: Path, ppo_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps({"prompt": "w1"}) + "\n")
    monkeypatch.chdir(tmp_path)
    main(["config", "validate", "-c", config_file.name, "data.train=mine.jsonl", "data.eval_fraction=0"])
    assert "{'train': 1}" in capsys.readouterr().out


@pytest.fixture
def sft_file(tiny_model: Path, tmp_path: Path) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "w1", "completion": " w2"}) + "\n")
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump({"data": {"train": str(rows), "max_tokens": 32}, "model": {"model": str(tiny_model)}}))
    return path


def test_other_stages_are_shown_and_validated(sft_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By name, or by a section that only one stage has, which may stand on the command line."""
    main(["config", "show", "-c", str(sft_file), "--stage", "sft"])
    by_name = capsys.readouterr().out
    main(["config", "show", "-c", str(sft_file), "sft.loss_on=completion"])
    assert capsys.readouterr().out == by_name == dump_config(load_config(SFTConfig, sft_file))
    main(["config", "validate", "-c", str(sft_file), "sft.loss_on=all"])
    assert capsys.readouterr().out == "valid: rows looked at 1\n"
    with pytest.raises(SystemExit) as ended:
        main(["config", "validate", "-c", str(sft_file), "data.max_tokens=1000", "--stage", "sft"])
    assert ended.value.code == 2 and "context of 128" in capsys.readouterr().err


def test_a_file_that_fits_several_stages_asks_which(sft_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (((), "(data, model) fit sft, reward, dpo"), (("--stage", "grpo"), "there is no stage 'grpo'")):
        with pytest.raises(SystemExit) as ended:
            main(["config", "show", "-c", str(sft_file), *arguments])
        err = capsys.readouterr().err
        assert ended.value.code == 2 and message in err and "sft" in err.split("do:")[1]


def test_show_answers_without_the_libraries_of_models(config_file: Path) -> None:
    """Decision 0001: at once, on any machine."""
    shows = f"from rlhf_dist.cli.main import main; main(['config', 'show', '-c', {str(config_file)!r}])"
    code = f"import sys; {shows}; assert not {{'torch', 'transformers', 'ray', 'deepspeed'}} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
