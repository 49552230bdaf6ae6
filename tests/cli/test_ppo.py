"""`rlhf-dist ppo` as a user meets it: what is said at the end, and what is said when something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, LlamaForSequenceClassification

from rlhf_dist.cli.ppo import show_before_after
from rlhf_dist.runs.metrics import read_metrics

Values = dict[str, Any]


@pytest.fixture
def refused(rlhf_dist_ppo: Callable[..., Path], ppo_values: Values, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused("key=value", section={...})`: runs, expects status 2, and gives the message; what, where and do stand in it."""

    def run(*overrides: str, **changes: Values) -> str:
        for section, given in changes.items():
            ppo_values[section] = ppo_values.get(section, {}) | given
        with pytest.raises(SystemExit) as ended:
            rlhf_dist_ppo(ppo_values, *overrides)
        assert ended.value.code == 2
        shown: str = capfd.readouterr().err
        assert shown.count("\nerror: ") + shown.startswith("error: ") == 1 and "Traceback" not in shown, shown
        error = (
            shown[shown.index("\nerror: ") + 1 :] if "\nerror: " in shown else shown
        )  # a compiler may have complained to DeepSpeed before
        assert "\n  where: " in error and "\n  do:    " in error, error
        return error

    return run


@pytest.fixture
def nothing_ran(ppo_values: Values) -> Callable[[], bool]:
    """Whether no run folder holds a metric: the fault was found before any step."""
    return lambda: not (Path(ppo_values["run"]["output_dir"]) / "test" / "metrics.jsonl").exists()


# --- the end of a run


def test_a_run_ends_with_before_and_after(
    rlhf_dist_ppo: Callable[..., Path], ppo_values: Values, capfd: pytest.CaptureFixture[str]
) -> None:
    root = rlhf_dist_ppo(ppo_values, "run.steps=1")
    shown = capfd.readouterr()
    assert "step 1/1  reward " in shown.out and "preflight passed: " in shown.out
    assert "Held-out prompts, before and after" in shown.out and "Samples, before and after" in shown.out
    assert shown.out.rstrip().endswith(f"everything of this run: {root}")
    assert not any(noise in shown.err for noise in ("MISSING", "Loading weights", "Writing model shards"))
    again = StringIO()
    show_before_after(root, Console(file=again, width=100))
    assert "before and after" in again.getvalue()


def test_without_held_out_prompts_there_is_nothing_to_compare(
    rlhf_dist_ppo: Callable[..., Path], ppo_values: Values, capfd: pytest.CaptureFixture[str]
) -> None:
    rlhf_dist_ppo(ppo_values, "run.steps=1", "data.eval_fraction=0")
    out = capfd.readouterr().out
    assert "before and after" not in out and "everything of this run" in out


# --- adapters and 4 bits


def test_adapters_over_4_bits_in_every_role(
    rlhf_dist_ppo: Callable[..., Path], ppo_values: Values, wide_model: Path, tmp_path: Path
) -> None:
    """Policy and value train adapters, a model reward is frozen; preflight's on-policy identity holds, and what is left loads in peft."""
    config = AutoConfig.from_pretrained(wide_model)
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(wide_model).save_pretrained(tmp_path / "judge")
    small = {"quantize": "nf4", "lora": {"r": 4}, "optim": {"lr": 0.01}}
    sources = [*ppo_values["reward"]["sources"], {"name": "judge", "kind": "model", "model": str(tmp_path / "judge")}]
    values = ppo_values | {
        "policy": small | {"model": str(wide_model)},
        "value": small,
        "reward": {"sources": sources, "quantize": "nf4"},
    }
    root = rlhf_dist_ppo(values, "run.steps=3")
    lines = [line for line in read_metrics(root / "metrics.jsonl") if "loss/value_avg" in line]
    assert len(lines) == 3 and lines[-1]["loss/value_avg"] < lines[0]["loss/value_avg"]
    assert all(line["policy/approxkl_avg"] > 0 for line in lines)
    base = AutoModelForCausalLM.from_pretrained(wide_model)
    adapted = PeftModel.from_pretrained(base, str(root / "export" / "policy" / "adapter"))
    assert any(parameter.any() for name, parameter in adapted.named_parameters() if "lora_B" in name)
    assert (root / "export" / "value" / "adapter").is_dir() is (root / "export" / "value").is_dir()


def test_a_reference_in_4_bits_is_another_model_than_the_policy(
    rlhf_dist_ppo: Callable[..., Path], ppo_values: Values, wide_model: Path
) -> None:
    """So the KL at step 0 is not 0: the sampled tokens are less likely under the rounded weights."""
    root = rlhf_dist_ppo(ppo_values | {"policy": {"model": str(wide_model)}, "reference": {"quantize": "nf4"}}, "run.steps=1")
    assert read_metrics(root / "metrics.jsonl")[-1]["objective/kl"] > 0.01


# --- the command line and the config


def test_a_typo_names_the_nearest_key(refused: Callable[..., str]) -> None:
    assert "algorithm.clip_hihg: no such key; did you mean 'clip_high'?" in refused("algorithm.clip_hihg=0.3")


def test_an_override_without_a_value(refused: Callable[..., str]) -> None:
    assert "not an override: 'run.steps'" in refused("run.steps")


def test_sections_that_do_not_go_together(refused: Callable[..., str]) -> None:
    assert "rollout.samples_per_prompt must be at least 2" in refused("algorithm.estimator=grpo", "rollout.samples_per_prompt=1")


def test_a_config_file_that_is_missing(capfd: pytest.CaptureFixture[str]) -> None:
    from rlhf_dist.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["ppo", "--config", "nowhere.yaml"])
    assert ended.value.code == 2
    assert "cannot read the config file" in capfd.readouterr().err


def test_an_existing_run_folder(refused: Callable[..., str], rlhf_dist_ppo: Callable[..., Path], ppo_values: Values) -> None:
    root = rlhf_dist_ppo(ppo_values, "run.steps=1")
    before = (root / "metrics.jsonl").read_text()
    assert "run.overwrite=true" in refused("run.steps=1")
    assert (root / "metrics.jsonl").read_text() == before
    rlhf_dist_ppo(ppo_values, "run.steps=1", "run.overwrite=true", "run.seed=9")
    assert (root / "metrics.jsonl").read_text() != before


# --- data


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("", "has no rows", None),
        ('{"prompt": "w1"}\n{"prompt": "w2"\n', "not a JSON line", 2),
        ('{"prompt": "w1"}\n{"prompt": "w2"}\n{"question": "w3"}\n', "prompt", 3),
        ('{"prompt": "w1"}\n{"prompt": 7}\n', "the prompt is int, not text", 2),
        ('{"prompt": "w1"}\n{"prompt": ""}\n', "the prompt is empty", 2),
        ('{"prompt": "w1"}\n["w2"]\n', "the row is a JSON array", 2),
        ('{"prompt": "w1"}\n{"prompt": "' + "w2 " * 30 + '"}\n', "the prompt has 31 tokens; data.max_prompt_tokens is 16", 2),
    ],
)
def test_bad_rows_are_named_by_file_and_line(
    refused: Callable[..., str], nothing_ran: Callable[[], bool], tmp_path: Path, text: str, what: str, line: int | None
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    error = refused(data={"train": str(path), "eval_fraction": 0.0})
    assert what in error and f"where: {path}" + (f":{line}" if line else "") in error
    assert nothing_ran()


def test_a_data_file_that_is_missing(refused: Callable[..., str]) -> None:
    assert "the data file does not exist" in refused("data.train=nowhere.jsonl")


def test_no_prompt_is_held_out(refused: Callable[..., str]) -> None:
    assert "falls into the eval split" in refused("data.eval_fraction=0.0001")


def test_all_prompts_are_too_long(refused: Callable[..., str]) -> None:
    assert "longer than data.max_prompt_tokens and were dropped" in refused("data.max_prompt_tokens=1", "data.overlong=drop")


# --- models


def test_a_model_folder_that_is_missing(refused: Callable[..., str], nothing_ran: Callable[[], bool]) -> None:
    assert "there is no model folder of this name\n  where: /nowhere/model" in refused("policy.model=/nowhere/model")
    assert nothing_ran()


def test_completions_that_cannot_fit(refused: Callable[..., str]) -> None:
    assert "need 1016 positions; the policy model has 128" in refused("rollout.max_new_tokens=1000")


def save(model: Any, tokenizer_of: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder


def test_a_model_that_is_no_causal_lm(
    refused: Callable[..., str], nothing_ran: Callable[[], bool], tiny_model: Path, tmp_path: Path
) -> None:
    encoder = BertModel(BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    folder = save(encoder, tiny_model, tmp_path / "bert")
    error = refused(f"policy.model={folder}", "data.max_prompt_tokens=8")
    assert f"where: {folder}" in error
    classifier = save(LlamaForSequenceClassification.from_pretrained(tiny_model, num_labels=1), tiny_model, tmp_path / "classifier")
    error = refused(f"policy.model={classifier}")
    assert "lm_head.weight" in error and "would be random" in error
    assert nothing_ran()


def test_a_reward_model_that_is_no_classifier(refused: Callable[..., str], nothing_ran: Callable[[], bool], tiny_model: Path) -> None:
    error = refused(reward={"sources": [{"name": "taste", "kind": "model", "model": str(tiny_model)}]})
    assert "this is not a trained sequence classifier" in error and "score.weight" in error
    assert nothing_ran()


def test_a_reward_model_with_several_outputs(refused: Callable[..., str], tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save(LlamaForSequenceClassification.from_pretrained(tiny_model, num_labels=3), tiny_model, tmp_path / "three")
    assert "the reward model has 3 outputs" in refused(reward={"sources": [{"name": "taste", "kind": "model", "model": str(folder)}]})


def test_fp16_on_a_cpu(refused: Callable[..., str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "DeepSpeed refuses fp16 on a CPU\n  where: policy.dtype" in refused("policy.dtype=fp16", "reference.dtype=fp16")


def test_a_deepspeed_file_that_is_missing(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "cannot read the DeepSpeed file" in refused("policy.deepspeed=nowhere.json")
    (tmp_path / "broken.json").write_text("{")
    assert "the DeepSpeed file is not JSON" in refused(f"value.deepspeed={tmp_path / 'broken.json'}")


# --- rewards


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("short", "returned 1 values for 2 completions"),
        ("text", "returned 'good' (str) for row 0"),
        ("nan", "returned nan for row 0: a failure, not a score"),
        ("evn", "has no function 'evn'; did you mean 'even'?"),
    ],
)
def test_a_broken_reward_is_found_before_anything_starts(
    refused: Callable[..., str], nothing_ran: Callable[[], bool], reward_file: Path, function: str, what: str
) -> None:
    assert what in refused(f"reward.sources.0.path={reward_file}:{function}")
    assert nothing_ran()


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("no_such_module_at_all:reward", "there is no module 'no_such_module_at_all'"),
        ("nowhere.py:reward", "there is no file "),
        ("just_a_name", "not the path of a function: 'just_a_name'"),
    ],
)
def test_a_reward_that_cannot_be_imported(refused: Callable[..., str], path: str, what: str) -> None:
    assert what in refused(f"reward.sources.0.path={path}")


def test_a_reward_that_raises_is_named_by_its_line(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "raises.py").write_text("def reward(prompts, completions):\n    return [1 / 0 for _ in completions]\n")
    error = refused(f"reward.sources.0.path={tmp_path / 'raises.py'}:reward")
    assert "reward 'even' raised ZeroDivisionError" in error and f"where: {tmp_path / 'raises.py'}:2" in error


def test_a_reward_that_always_abstains(refused: Callable[..., str], nothing_ran: Callable[[], bool], reward_file: Path) -> None:
    """Abstaining is no fault of a probe, but there is nothing to learn from: the first evaluation, or the first step, says so."""
    assert "were dropped" in refused(f"reward.sources.0.path={reward_file}:abstains")
    assert nothing_ran()
    assert "all 16 samples were dropped" in refused(
        f"reward.sources.0.path={reward_file}:abstains", "data.eval_fraction=0", "run.name=other"
    )


TURNS = """
calls = 0
def reward(prompts, completions):
    global calls
    calls += 1
    return [{bad} if calls > {after} else 0.5 for _ in completions]
"""


@pytest.mark.parametrize(("bad", "what"), [('float("nan")', "returned nan for row 0"), ("1 / 0", "raised ZeroDivisionError")])
def test_a_reward_that_turns_bad_stops_the_run_with_the_same_message(
    refused: Callable[..., str], ppo_values: Values, tmp_path: Path, bad: str, what: str
) -> None:
    """Called by preflight and in two steps (the check before the run had a process of its own); the third step fails."""
    (tmp_path / "turns.py").write_text(TURNS.format(bad=bad, after=3))
    assert what in refused(f"reward.sources.0.path={tmp_path / 'turns.py'}:reward", "data.eval_fraction=0", "run.steps=5")
    root = Path(ppo_values["run"]["output_dir"]) / "test"
    assert [line["step"] for line in read_metrics(root / "metrics.jsonl")] == [0, 1, 2]  # what was done stays
    assert len(list((root / "rollouts").iterdir())) == 2 and not (root / "summary.json").exists()


def test_a_reward_that_interrupts_itself_is_a_failed_reward(refused: Callable[..., str], tmp_path: Path) -> None:
    """It does so in its own process; Ctrl-C on the run is in test_interrupts.py."""
    check = "    if len(completions) > 2:\n        raise KeyboardInterrupt\n"
    interrupts = f"def reward(prompts, completions):\n{check}    return [0.0] * len(completions)\n"
    (tmp_path / "interrupts.py").write_text(interrupts)
    said = refused(f"reward.sources.0.path={tmp_path / 'interrupts.py'}:reward", "data.eval_fraction=0")
    assert "KeyboardInterrupt" in said or "ended" in said


def test_a_bug_of_ours_keeps_its_traceback(rlhf_dist_ppo: Callable[..., Path], ppo_values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_dist.coordinator.ppo.estimate", lambda *given, **named: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        rlhf_dist_ppo(ppo_values)
