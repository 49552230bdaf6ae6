"""A run goes on with the data and the models it began with; a mended reward function is only told."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_dist.cli.main import main
from rlhf_dist.config.dpo import DPOConfig
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.config.sft import SFTConfig
from rlhf_dist.runs.folder import RunFolder
from rlhf_dist.runs.inputs import ENDS, INPUTS, check_same_inputs, fingerprint, inputs_text
from rlhf_dist.runs.recorder import Recorder


def model(folder: Path, weights: bytes = b"0") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


@pytest.fixture
def values(ppo_values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A config all of whose inputs lie in the test's own folder."""
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "w1"}\n')
    (tmp_path / "reward.py").write_text("def even(prompts, completions, **columns): ...")
    for role in ("policy", "reference", "value", "judge"):
        model(tmp_path / role)
    sources = [
        {"name": "even", "kind": "function", "path": f"{tmp_path}/reward.py:even"},
        {"name": "installed", "kind": "function", "path": "package.module:function"},
        {"name": "judge", "kind": "model", "model": str(tmp_path / "judge")},
    ]
    return ppo_values | {
        "data": {"train": [str(tmp_path / "train.jsonl")], "eval": [str(tmp_path / "held_out.jsonl")]},
        "policy": {"model": str(tmp_path / "policy")},
        "reference": {"model": str(tmp_path / "reference")},
        "value": {"model": str(tmp_path / "value")},
        "reward": {"sources": sources},
    }


@pytest.fixture
def checkpoint(values: dict[str, Any], tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / INPUTS).write_text(inputs_text(PPOConfig.model_validate(values)))
    return folder


def test_every_input_is_in_it_and_hub_names_are_not(values: dict[str, Any], tmp_path: Path) -> None:
    found = fingerprint(PPOConfig.model_validate(values))
    assert {str(Path(path).relative_to(tmp_path)) for kind in found.values() for path in kind} == {
        "train.jsonl", "held_out.jsonl", "reward.py",
        *(f"{role}/{name}" for role in ("policy", "reference", "value", "judge") for name in ("config.json", "model.safetensors")),
    }  # fmt: skip
    assert found["data"][str(tmp_path / "train.jsonl")] == hashlib.sha256(b'{"prompt": "w1"}\n').hexdigest()
    assert found["model"][str(tmp_path / "judge" / "model.safetensors")] == f"1:{hashlib.sha256(b'00').hexdigest()}"
    hub = values | {
        "policy": {"model": "someone/model"},
        "reference": {},
        "value": {},
        "reward": {"sources": values["reward"]["sources"][:1]},
    }
    assert fingerprint(PPOConfig.model_validate(hub))["model"] == {}


@pytest.mark.parametrize("stage", [SFTConfig, DPOConfig])
def test_the_supervised_stages_too(stage: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    config = stage.model_validate({"data": {"train": str(tmp_path / "rows.jsonl")}, "model": {"model": str(model(tmp_path / "base"))}})
    found = fingerprint(config)
    assert list(found["data"]) == [str(tmp_path / "rows.jsonl")] and len(found["model"]) == 2


def test_the_same_inputs_are_the_same(values: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "policy" / "README.md").write_text("what is never loaded")
    assert check_same_inputs(checkpoint, PPOConfig.model_validate(values)) == []


@pytest.mark.parametrize(
    "name", ["train.jsonl", "held_out.jsonl", *(f"{r}/model.safetensors" for r in ("policy", "reference", "value", "judge"))]
)
@pytest.mark.parametrize("change", [lambda path: path.write_text("?"), Path.unlink], ids=["changed", "gone"])
def test_other_data_or_another_model_is_named(
    values: dict[str, Any], checkpoint: Path, tmp_path: Path, name: str, change: Callable[[Path], Any]
) -> None:
    change(tmp_path / name)
    with pytest.raises(UserError, match=r"is not what it was when the run began") as caught:
        check_same_inputs(checkpoint, PPOConfig.model_validate(values))
    assert str(tmp_path / name) in caught.value.what and caught.value.where == str(checkpoint)
    assert caught.value.what.endswith("it is gone, or cannot be read") == (not (tmp_path / name).exists())


def test_a_file_that_came_into_a_model_folder_counts_and_the_rest_is_counted(
    values: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "value")
    (tmp_path / "policy" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"policy/adapter_config\.json is not what it was when the run began \(and 2 more\)"):
        check_same_inputs(checkpoint, PPOConfig.model_validate(values))


def test_a_mended_reward_is_a_reason_to_go_on(values: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def even(prompts, completions, **columns): return [1.0 for _ in completions]")
    assert check_same_inputs(checkpoint, PPOConfig.model_validate(values)) == [
        f"{tmp_path}/reward.py is not what it was when the run began"
    ]


@pytest.mark.parametrize("place", [0, ENDS - 1, -1, -ENDS])
def test_of_a_large_file_both_ends_are_seen(values: dict[str, Any], tmp_path: Path, place: int) -> None:
    weights = tmp_path / "policy" / "model.safetensors"
    contents = bytearray(3 * ENDS)
    weights.write_bytes(contents)
    before = fingerprint(PPOConfig.model_validate(values))["model"][str(weights)]
    contents[place] = 1
    weights.write_bytes(contents)
    assert fingerprint(PPOConfig.model_validate(values))["model"][str(weights)] != before
    contents[place] = 0
    weights.write_bytes(contents + b"\0")
    assert fingerprint(PPOConfig.model_validate(values))["model"][str(weights)] != before


def test_the_base_of_an_adapter_is_an_input(values: dict[str, Any], tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    for named, counted in ((str(base), 2), ("someone/base", 0), (3, 0)):
        (tmp_path / "policy" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
        found = fingerprint(PPOConfig.model_validate(values))["model"]
        assert len(found) == 9 + counted and (str(base / "model.safetensors") in found) == bool(counted)


def test_an_older_checkpoint_is_not_checked_and_a_spoilt_one_is_an_error(values: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("other")
    config = PPOConfig.model_validate(values)
    for text in (b"{", b"[]", b"\xff", b'{"data": 1}'):
        (checkpoint / INPUTS).write_bytes(text)
        with pytest.raises(UserError, match=r"inputs\.json cannot be read"):
            check_same_inputs(checkpoint, config)
    (checkpoint / INPUTS).unlink()
    assert check_same_inputs(checkpoint, config) == []


def commit(recorder: Recorder, step: int) -> Path:
    (Path(recorder.begin_checkpoint(step)) / "weights").write_text("w")
    recorder.commit_checkpoint(step, {"step": step}, [], keep=9)
    found = recorder.newest_checkpoint(print)
    assert found is not None and found.step == step
    return found.folder


def test_a_run_keeps_what_it_began_with_through_all_its_lives(values: dict[str, Any], tmp_path: Path) -> None:
    config, recorder = PPOConfig.model_validate(values), Recorder(RunFolder.create(tmp_path, "run"))
    recorder.config(config)
    began = json.dumps(fingerprint(config), indent=2) + "\n"
    first = commit(recorder, 1)
    assert (first / INPUTS).read_text() == began == (tmp_path / "run" / INPUTS).read_text()
    (tmp_path / "reward.py").write_text("def even(): ...")
    recorder.config(config, first)
    second = commit(recorder, 2)
    assert (second / INPUTS).read_text() == began
    recorder.config(config)  # begun anew, where nothing was there to go on from
    assert (commit(recorder, 3) / INPUTS).read_text() == inputs_text(config) != began


def test_what_was_not_known_at_the_start_is_not_made_up_later(values: dict[str, Any], tmp_path: Path) -> None:
    config, recorder = PPOConfig.model_validate(values), Recorder(RunFolder.create(tmp_path, "run"))
    recorder.config(config)
    old = tmp_path / "old"
    old.mkdir()
    recorder.config(config, old)
    assert not (commit(recorder, 2) / INPUTS).exists()
    Recorder(RunFolder(tmp_path / "none"), writes=False).config(config)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("stage", ["ppo", "sft"])
def test_a_run_goes_on_with_what_it_began_with(
    stage: str, ppo_values: dict[str, Any], reward_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line: with other prompts it is refused, with a mended reward it goes on, and remembers how it began."""
    data, reward = tmp_path / "rows.jsonl", tmp_path / "reward.py"
    row = '{"prompt": "w%d w2", "completion": " w3"}\n'
    data.write_text("".join(row % n for n in range(16)))
    shutil.copyfile(reward_file, reward)
    run = ppo_values["run"]
    values: dict[str, Any] = {"run": run, "data": {"train": str(data)}, "checkpoint": {"every": 1}, "placement": {"launcher": "spmd"}}
    if stage == "ppo":
        sources = [{"name": "even", "kind": "function", "path": f"{reward}:even"}]
        values["data"] |= {"max_prompt_tokens": 16}
        values = ppo_values | values | {"reward": {"sources": sources}}
    else:
        values["data"] |= {"max_tokens": 32}
        values |= {"run": {key: run[key] for key in ("name", "output_dir")}, "model": ppo_values["policy"], "training": {"batch_size": 8}}
    config, root = tmp_path / "config.yaml", Path(run["output_dir"]) / run["name"]
    config.write_text(yaml.safe_dump(values))
    main([stage, "--config", str(config)])
    began = (root / "inputs.json").read_text()
    (root / "summary.json").unlink()  # as if it had died after its first step
    before = data.read_text()
    data.write_text(before.replace("w2", "w5"))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([stage, "--config", str(config), "run.resume=auto"])
    assert f"{data} is not what it was when the run began" in capsys.readouterr().err
    data.write_text(before)
    reward.write_text(reward.read_text() + "\n")
    main([stage, "--config", str(config), "run.resume=auto"])
    told = f"going on with another reward function: {reward} is not what it was" in capsys.readouterr().out
    assert told == (stage == "ppo") and (root / "summary.json").exists()
    assert (root / "inputs.json").read_text() == began == (root / "checkpoints" / "step_000001" / "inputs.json").read_text()
