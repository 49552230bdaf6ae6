"""`rlhf-dist export` through the real command line: adapters and checkpoints in, a folder for transformers out; what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_dist.cli.main import main
from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.optim import OptimSection
from rlhf_dist.engines.deepspeed import DeepSpeedEngine, Training
from rlhf_dist.models.loading import load_causal_lm, load_token_scorer
from rlhf_dist.models.policy import PolicyModule
from rlhf_dist.models.value import ValueModule

TOKENS = torch.arange(4, 12)[None]
TEXTS = ["w1 w2 w3 w4 w5 w6 </s>", "w7 </s>", "w8 w9 w1"]
ZERO2 = {
    "zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1, "fp16": {"enabled": False},
    "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
}  # fmt: skip
EMBEDDED = ["embed_tokens", "q_proj"]


def adapter(base: Path, folder: Path, task: str = "CAUSAL_LM") -> Path:
    """A random adapter, saved by peft."""
    kind, options = (AutoModelForCausalLM, {}) if task == "CAUSAL_LM" else (AutoModelForSequenceClassification, {"num_labels": 2})
    torch.manual_seed(1)
    model = get_peft_model(kind.from_pretrained(base, **options), LoraConfig(r=2, target_modules="all-linear", task_type=task))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(folder))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["export", *arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_an_adapter_is_merged_and_loads_with_transformers(task: str, tiny_model: Path, tmp_path: Path, capsys: Any) -> None:
    source, out = adapter(tiny_model, tmp_path / "adapter", task), tmp_path / "new" / "merged"
    main(["export", str(source), "--out", str(out)])
    assert "adapter merged: " in capsys.readouterr().out
    kind: Any = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    options = {} if task == "CAUSAL_LM" else {"num_labels": 2}
    merged, report = kind.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not (out / "adapter_config.json").exists()
    want = logits(PeftModel.from_pretrained(kind.from_pretrained(tiny_model, **options), str(source)))
    torch.testing.assert_close(logits(merged), want, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out)("w1 w2") == AutoTokenizer.from_pretrained(tiny_model)("w1 w2")


def test_a_checkpoint_is_put_together(tiny_model: Path, tmp_path: Path, plain_rank: Any, capsys: Any) -> None:
    model = load_causal_lm(EngineSection(), str(tiny_model))
    engine = DeepSpeedEngine(PolicyModule(model), ZERO2, plain_rank, Training(OptimSection(), 1))
    engine.begin_save(tmp_path / "run" / "policy")
    engine.saved(wait=True)
    main(["export", str(tmp_path / "run" / "policy"), "--out", str(tmp_path / "out")])
    assert "checkpoint put together: " in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(tiny_model)))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 64
    said = refused(capsys, str(tmp_path / "run"), "--out", str(tmp_path / "other"))
    assert "neither a PEFT adapter nor an engine's" in said and "subfolders: policy" in said


@pytest.mark.parametrize(
    ("tied", "targets"), [(False, "all-linear"), (True, "all-linear"), (False, EMBEDDED), (True, EMBEDDED), (True, None)]
)
def test_a_reward_model_is_exported_as_its_training_exported_it(
    tied: bool, targets: Any, pad_is_eos: Any, train_judge: Any, tmp_path: Path
) -> None:
    """Out of its adapter and out of its checkpoint, file by file: the pad that training added, in weights, config and tokenizer."""
    run = train_judge(pad_is_eos(tied), lora={"r": 2, "target_modules": targets} if targets else None)
    want = run / "export"
    for source in ("checkpoint", "export/adapter") if targets else ("checkpoint",):
        out = tmp_path / "out" / source
        main(["export", str(run / source), "--out", str(out)])
        assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in want.iterdir() if path.is_file())
        for path in out.glob("*.json"):
            assert json.loads(path.read_text()) == json.loads((want / path.name).read_text()), path.name
        got, expected = load_file(out / "model.safetensors"), load_file(want / "model.safetensors")
        assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
        together = scored(out, TEXTS)
        assert together == pytest.approx([scored(out, [text])[0] for text in TEXTS], abs=1e-5)
    config = json.loads((want / "config.json").read_text())
    assert (config["pad_token_id"], config["vocab_size"], config["eos_token_id"]) == (64, 65, [2, 7])


def test_a_value_models_checkpoint_keeps_its_tokenizer(pad_is_eos: Any, plain_rank: Any, tmp_path: Path) -> None:
    """It was trained with no pad of its own, so none is added."""
    base = pad_is_eos()
    module = ValueModule(load_token_scorer(EngineSection(), str(base), zero_head=True))
    engine = DeepSpeedEngine(module, ZERO2, plain_rank, Training(OptimSection(), 1))
    engine.begin_save(tmp_path / "value")
    engine.saved(wait=True)
    main(["export", str(tmp_path / "value"), "--out", str(tmp_path / "out")])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 64
    assert AutoConfig.from_pretrained(tmp_path / "out").pad_token_id == 2


def scored(folder: Path, texts: list[str]) -> list[float]:
    """As anybody would: the tokenizer's padding, the model's own pooling."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = AutoModelForSequenceClassification.from_pretrained(folder)(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    return [float(score) for score in logits[:, 0]]


def test_an_adapter_made_for_another_base_model(tiny_model: Path, tmp_path: Path, capsys: Any) -> None:
    source, base = adapter(tiny_model, tmp_path / "adapter"), tmp_path / "base"
    config = AutoConfig.from_pretrained(tiny_model)
    config.intermediate_size = 48
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    said = refused(capsys, str(source), "--out", str(tmp_path / "out"), "--base", str(base))
    assert "the adapter was made for another base model" in said and "model.layers.0.mlp.down_proj" in said
    assert not (tmp_path / "out").exists()


def test_a_moved_base_is_named(tiny_model: Path, tmp_path: Path, capsys: Any) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    source = adapter(base, tmp_path / "adapter")
    base.rename(tmp_path / "moved")
    assert "no model folder" in refused(capsys, str(source), "--out", str(tmp_path / "out"))
    main(["export", str(source), "--out", str(tmp_path / "out"), "--base", str(tmp_path / "moved")])
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_what_is_there_is_not_overwritten(tiny_model: Path, tmp_path: Path, capsys: Any) -> None:
    source = adapter(tiny_model, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert "is not empty" in refused(capsys, str(source), "--out", str(tmp_path / "out"))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["mine.txt"]


@pytest.mark.parametrize("source", ["nothing", "base"])
def test_a_source_that_is_neither(source: str, tiny_model: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "neither a PEFT adapter nor" in refused(capsys, str(tmp_path / source), "--out", str(tmp_path / "out"))
