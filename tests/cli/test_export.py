"""`rlhf-dist export` through the real command line: adapters and checkpoints in, a folder for transformers out; what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_dist.cli.main import main
from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.optim import OptimSection
from rlhf_dist.engines.deepspeed import DeepSpeedEngine, Training
from rlhf_dist.models.loading import load_causal_lm
from rlhf_dist.models.policy import PolicyModule

TOKENS = torch.arange(4, 12)[None]


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
    config = {
        "zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1, "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    engine = DeepSpeedEngine(PolicyModule(model), config, plain_rank, Training(OptimSection(), 1))
    engine.save(tmp_path / "run" / "policy")
    main(["export", str(tmp_path / "run" / "policy"), "--out", str(tmp_path / "out")])
    assert "checkpoint put together: " in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(tiny_model)))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 64
    said = refused(capsys, str(tmp_path / "run"), "--out", str(tmp_path / "other"))
    assert "neither a PEFT adapter nor a DeepSpeed checkpoint" in said and "subfolders: policy" in said


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
