"""Folders out of trained weights: peft and transformers load them and answer as the engine's model does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_dist.config.engines import EngineSection, LoraSection
from rlhf_dist.models.loading import load_causal_lm, load_token_scorer
from rlhf_dist.models.lora import add_adapter, trained_weights
from rlhf_dist.models.saving import ORIGIN, write_adapter, write_origin

TOKENS = torch.arange(4, 12)[None]


def trained(model: Any) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        output = model(input_ids=TOKENS)
        output.logits.float().log_softmax(-1)[..., 0].sum().backward() if output.logits.dim() == 3 else output.logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def written(model: Any, folder: Path) -> Path:
    write_adapter(model, {name: compute() for name, _, compute in trained_weights(model)}, folder)
    return folder


def policy(path: Path, seed: int = 0, **options: Any) -> Any:
    section = EngineSection(**{key: options.pop(key) for key in ("quantize", "dtype") if key in options})
    return trained(add_adapter(load_causal_lm(section, str(path)), LoraSection(**({"r": 2, "alpha": 3.0} | options)), seed))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "embed_tokens"]])
def test_peft_loads_a_policys_adapter_and_answers_as_it_does(targets: Any, tiny_model: Path, tmp_path: Path) -> None:
    model = policy(tiny_model, target_modules=targets)
    folder = written(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(folder)).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model), logits(AutoModelForCausalLM.from_pretrained(tiny_model)), atol=0.05)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model) and config["task_type"] == "CAUSAL_LM"
    assert config["target_modules"] == sorted(config["target_modules"]) and (config["r"], config["lora_alpha"]) == (2, 3.0)
    torch.testing.assert_close(logits(load_causal_lm(EngineSection(), str(folder))), logits(model), rtol=1e-5, atol=1e-5)


def test_peft_loads_a_classifiers_adapter_with_its_head(tiny_model: Path, tmp_path: Path) -> None:
    model = load_token_scorer(EngineSection(), str(tiny_model), zero_head=True)
    model = trained(add_adapter(model, LoraSection(r=2), 0, head="score"))
    folder = written(model, tmp_path / "adapter")
    assert float(logits(model).abs().max()) > 0.01
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, str(folder)).eval()), logits(model), rtol=1e-5, atol=1e-5)
    automatic = AutoPeftModelForSequenceClassification.from_pretrained(str(folder), num_labels=1).eval()
    torch.testing.assert_close(logits(automatic), logits(model), rtol=1e-5, atol=1e-5)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    again = load_token_scorer(EngineSection(), str(folder), zero_head=False)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("second", [{}, {"r": 5, "target_modules": ["q_proj", "embed_tokens"]}])
def test_an_adapter_on_an_adapter_is_written_as_their_sum_on_the_first_base(second: Any, tiny_model: Path, tmp_path: Path) -> None:
    first = written(policy(tiny_model, target_modules=["q_proj", "up_proj"]), tmp_path / "first")
    model = policy(first, seed=1, **second)
    folder = written(model, tmp_path / "both")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(folder)).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(logits(load_causal_lm(EngineSection(), str(folder))), logits(model), rtol=1e-5, atol=2e-5)
    assert not torch.allclose(logits(load_causal_lm(EngineSection(), str(first))), logits(model), atol=0.02)


def test_a_classifiers_adapter_on_a_policys_adapter(tiny_model: Path, tmp_path: Path) -> None:
    first = written(policy(tiny_model, target_modules=["q_proj", "lm_head"]), tmp_path / "first")
    scorer = load_token_scorer(EngineSection(), str(first), zero_head=True)
    model = trained(add_adapter(scorer, LoraSection(r=2), 0, head="score"))
    folder = written(model, tmp_path / "both")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, str(folder)).eval()), logits(model), rtol=1e-5, atol=1e-5)


def test_an_adapter_trained_over_4_bits_has_the_precision_of_training(wide_model: Path, tmp_path: Path) -> None:
    model = policy(wide_model, quantize="nf4", dtype="bf16")
    folder = written(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(wide_model, dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, model.get_parameter(name))


def test_a_checkpoints_origin_names_base_precision_and_adapters(wide_model: Path, tmp_path: Path) -> None:
    def origin(model: Any) -> Any:
        write_origin(model, tmp_path)
        return json.loads((tmp_path / ORIGIN).read_text())

    plain = {"base": str(wide_model), "dtype": "fp32", "quantize": "none", "lora": None, "head": None}
    assert origin(load_causal_lm(EngineSection(), str(wide_model))) == plain
    model = policy(wide_model, quantize="nf4", dtype="bf16", target_modules=["q_proj"])
    lora = {"r": 2, "alpha": 3.0, "target_modules": ["q_proj"]}
    assert origin(model) == plain | {"dtype": "bf16", "quantize": "nf4", "lora": lora}
    scorer = add_adapter(load_token_scorer(EngineSection(), str(wide_model), zero_head=True), LoraSection(r=2), 0, head="score")
    assert origin(scorer)["head"] == "score"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["use_cache"] is True
