from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_dist.cli.checks import check_run
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig


def check(values: dict[str, Any], **changes: dict[str, Any]) -> dict[str, Any]:
    return check_run(PPOConfig.model_validate(values | {section: values.get(section, {}) | given for section, given in changes.items()}))


def test_facts_of_a_sound_config(ppo_values: dict[str, Any]) -> None:
    assert check(ppo_values) == {"rewards": "even", "stop tokens": [2], "prompts looked at": {"train": 28, "eval": 12}}
    assert check(ppo_values, data={"eval_fraction": 0.0})["prompts looked at"] == {"train": 40}


def test_no_weights_are_loaded(ppo_values: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    """A folder without weights passes: the check takes seconds, whatever the size of the model."""
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert check(ppo_values, policy={"model": str(tmp_path)})["stop tokens"] == [2]


def test_completions_must_fit_the_context_of_every_model(ppo_values: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    check(ppo_values, rollout={"max_new_tokens": 112})  # 16 + 112 = 128
    with pytest.raises(
        UserError, match="up to 16 tokens and completions of up to 113 need 129 positions; the policy model has 128"
    ) as error:
        check(ppo_values, rollout={"max_new_tokens": 113})
    assert error.value.fix == "lower one of them: their sum may be 128 at most"
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"max_position_embeddings": 20}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for role in ("reference", "value"):
        with pytest.raises(UserError, match=f"the {role} model has 20"):
            check(ppo_values, **{role: {"model": str(tmp_path)}})


def test_what_is_not_started_is_not_checked(ppo_values: dict[str, Any]) -> None:
    wrong = {"model": "/nowhere", "deepspeed": "/nowhere.json"}
    check(ppo_values, value=wrong, algorithm={"estimator": "rloo"})
    with pytest.raises(UserError, match="cannot read the DeepSpeed file"):
        check(ppo_values, value=wrong)
    check(ppo_values, policy={"lora": {}}, reference={"deepspeed": "/nowhere.json"})


@pytest.mark.parametrize("launcher", ["spmd", "ray"])
@pytest.mark.parametrize("role", ["policy", "reference", "value", "reward"])
def test_fp16_needs_a_gpu(ppo_values: dict[str, Any], role: str, launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    fp16: dict[str, Any] = {role: {"dtype": "fp16"}}
    with pytest.raises(UserError, match="refuses fp16 on a CPU") as error:
        check(ppo_values, placement={"launcher": launcher}, **fp16)
    assert error.value.where == f"{role}.dtype"


def test_fp16_with_a_gpu(ppo_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(ppo_values, placement={"launcher": "ray"}, policy={"dtype": "fp16", "gpus_per_rank": 0.5})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert check(ppo_values, policy={"dtype": "fp16"})


def test_deepspeed_files_are_read(ppo_values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}))
    with pytest.raises(UserError, match="sets 'optimizer'"):
        check(ppo_values, policy={"deepspeed": str(tmp_path / "zero.json")})


def test_model_rewards_are_looked_at(ppo_values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model folder"):
        check(ppo_values, reward={"sources": [{"name": "m", "kind": "model", "model": str(tmp_path / "nowhere")}]})


SEES = """
import json, pathlib
def reward(prompts, completions, answer):
    pathlib.Path(__file__).with_suffix(".json").write_text(json.dumps([prompts, len(completions), answer]))
    return [0.0] * len(prompts)
"""


def test_rewards_are_called_on_two_real_rows_with_their_columns(ppo_values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "sees.py").write_text(SEES)
    check(
        ppo_values,
        reward={"sources": [{"name": "f", "kind": "function", "path": f"{tmp_path / 'sees.py'}:reward"}]},
        data={"eval_fraction": 0.0},
    )
    assert json.loads((tmp_path / "sees.json").read_text()) == [["w0", "w7 w8"], 2, ["w0", "w1"]]


def test_a_column_that_a_reward_needs_and_the_data_lacks(ppo_values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "needs.py").write_text("def reward(prompts, completions, solution):\n    return [0.0] * len(prompts)\n")
    with pytest.raises(UserError, match="needs 'solution', which the data does not have; its other columns: answer"):
        check(ppo_values, reward={"sources": [{"name": "f", "kind": "function", "path": f"{tmp_path / 'needs.py'}:reward"}]})


@pytest.fixture
def other_model(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """`other_model(vocab_size=…, words={old: new}, tokenizer=…)`: the tiny model's settings without weights, with another vocabulary."""

    def make(vocab_size: int | None = None, words: dict[str, str] | None = None, tokenizer: bool = True) -> Path:
        folder = tmp_path / "other"
        folder.mkdir()
        config = json.loads((tiny_model / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | ({"vocab_size": vocab_size} if vocab_size else {})))
        if tokenizer:
            (folder / "tokenizer_config.json").write_bytes((tiny_model / "tokenizer_config.json").read_bytes())
            files = json.loads((tiny_model / "tokenizer.json").read_text())
            vocabulary = files["model"]["vocab"]
            files["model"]["vocab"] = {(words or {}).get(word, word): number for word, number in vocabulary.items()}
            (folder / "tokenizer.json").write_text(json.dumps(files))
        return folder

    return make


@pytest.mark.parametrize("role", ["reference", "value"])
@pytest.mark.parametrize("tokenizer", [True, False])
def test_a_model_with_too_few_tokens_is_refused(
    ppo_values: dict[str, Any], other_model: Callable[..., Path], role: str, tokenizer: bool
) -> None:
    folder = other_model(vocab_size=63, tokenizer=tokenizer)
    with pytest.raises(UserError, match=f"the {role} model knows 63 tokens, the tokenizer of policy.model has 64") as error:
        check(ppo_values, **{role: {"model": str(folder)}})
    assert error.value.where == f"{role}.model"


@pytest.mark.parametrize("role", ["reference", "value"])
def test_a_model_with_another_vocabulary_is_refused(ppo_values: dict[str, Any], other_model: Callable[..., Path], role: str) -> None:
    """As many tokens, two of them the other way round."""
    with pytest.raises(UserError, match=f"the {role} model has another vocabulary than policy.model") as error:
        check(ppo_values, **{role: {"model": str(other_model(words={"w3": "w4", "w4": "w3"}))}})
    assert error.value.where == f"{role}.model"


@pytest.mark.parametrize("vocab_size", [64, 80])
@pytest.mark.parametrize("tokenizer", [True, False])
def test_a_model_that_reads_the_policys_tokens_passes(
    ppo_values: dict[str, Any], other_model: Callable[..., Path], vocab_size: int, tokenizer: bool
) -> None:
    """Embeddings may be padded, and a model may come without a tokenizer: then the size alone can be told."""
    folder = {"model": str(other_model(vocab_size, tokenizer=tokenizer))}
    assert check(ppo_values, reference=folder, value=folder)


def test_another_vocabulary_ends_the_run_with_status_2_before_anything_starts(
    ppo_values: dict[str, Any],
    other_model: Callable[..., Path],
    rlhf_dist_ppo: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from rlhf_dist.cli import programs

    monkeypatch.setattr(programs, "build_worker", lambda *_: pytest.fail("a worker was started"))
    with pytest.raises(SystemExit) as ended:
        rlhf_dist_ppo(ppo_values, f"reference.model={other_model(words={'w3': 'x3'})}")
    assert ended.value.code == 2 and "another vocabulary" in capfd.readouterr().err
    assert not Path(ppo_values["run"]["output_dir"]).exists()


@pytest.mark.parametrize("role", ["policy", "reference", "value"])
def test_a_layer_that_cannot_be_quantised_is_named_with_its_role(ppo_values: dict[str, Any], role: str) -> None:
    """The tiny model has layers of 32 inputs. An empty `model` is the policy's."""
    lora = {} if role == "reference" else {"lora": {}}
    with pytest.raises(UserError, match=r"the layer model\.layers\.0\.self_attn\.q_proj has 32 inputs") as caught:
        check(ppo_values, **{role: {"quantize": "nf4"} | lora})
    assert caught.value.where.startswith(f"{role}: ")


def test_on_a_gpu_any_width_can_be_quantised(ppo_values: dict[str, Any]) -> None:
    assert check(ppo_values, reference={"quantize": "nf4", "gpus_per_rank": 0.5})


def test_a_real_model_whose_layers_are_odd(ppo_values: dict[str, Any], shared: Path) -> None:
    path = str(shared / "models" / "stories15M")
    policy = {"model": path, "quantize": "nf4", "lora": {}}
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj has 288 inputs; .* multiples of 64"):
        check(ppo_values, policy=policy)


def test_a_quantised_model_reward_is_looked_at(ppo_values: dict[str, Any], tiny_model: Path) -> None:
    with pytest.raises(UserError, match="has 32 inputs") as caught:
        check(ppo_values, reward={"quantize": "nf4", "sources": [{"name": "m", "kind": "model", "model": str(tiny_model)}]})
    assert caught.value.where.startswith("reward m: ")


def test_an_adapter_made_for_another_base_model_is_found_before_a_process_starts(
    ppo_values: dict[str, Any], tiny_model: Path, wide_model: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(str(tmp_path))
    assert check(ppo_values, policy={"model": str(tmp_path)})["stop tokens"] == [2]
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(wide_model)}))
    with pytest.raises(
        UserError, match=r"the adapter was made for another base model: its model\.layers\.0\.self_attn\.q_proj\.lora_A"
    ) as caught:
        check(ppo_values, policy={"model": str(tmp_path)})
    assert caught.value.where.startswith("policy: ")


def test_an_endpoint_is_asked_before_training_and_its_token_must_be_there(
    ppo_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"name": "h", "kind": "http", "url": "http://127.0.0.1:9/score", "on_failure": "raise", "retries": 0}
    with pytest.raises(UserError, match="reward 'h' could not be asked: ConnectError"):
        check(ppo_values, reward={"sources": [source]})
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    with pytest.raises(UserError, match="the environment variable NO_SUCH_TOKEN is not set"):
        check(ppo_values, reward={"sources": [source | {"auth_env": "NO_SUCH_TOKEN"}]})


def test_a_reward_that_may_outlast_the_runs_patience_is_refused(ppo_values: dict[str, Any], reward_file: Path) -> None:
    source = {"name": "even", "kind": "function", "path": f"{reward_file}:even", "timeout_s": 30.0, "on_failure": "retry", "retries": 3}
    with pytest.raises(UserError, match=r"reward 'even' may take 123\.5 s.*silent for 100 s"):
        check(ppo_values, reward={"sources": [source]}, placement={"call_timeout_s": 100.0})


def test_a_column_that_no_checkpoint_can_hold_is_found_before_the_run(ppo_values: dict[str, Any], tmp_path: Path) -> None:
    """Only where rollouts wait for their step; NaN may wait."""
    rows = {"prompt": [f"w{row}" for row in range(20)], "weight": [float("nan")] * 20}
    path = tmp_path / "dated.parquet"
    pq.write_table(pa.table(rows), path)
    data = {"train": [str(path)], "eval_fraction": 0.0}
    assert check(ppo_values, data=data, rollout={"max_staleness": 1})
    pq.write_table(pa.table(rows | {"when": [None] * 3 + [datetime(2026, 1, 2)] * 17}), path)
    assert check(ppo_values, data=data)
    with pytest.raises(UserError, match="column 'when' holds values that cannot be saved with the rollouts") as caught:
        check(ppo_values, data=data, rollout={"max_staleness": 1})
    assert caught.value.where.startswith(str(path)) and caught.value.where.endswith("row 4") and "max_staleness=0" in caught.value.fix
