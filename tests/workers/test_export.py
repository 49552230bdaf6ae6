"""Exported folders load with transformers alone and answer as the engine did."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from rlhf_dist.config.engines import LoraSection, PolicySection, ValueSection
from rlhf_dist.config.optim import OptimSection
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.engines.deepspeed import Training
from rlhf_dist.models.loading import load_causal_lm, load_token_scorer, load_tokenizer, stop_tokens
from rlhf_dist.models.lora import add_adapter
from rlhf_dist.models.policy import PolicyModule
from rlhf_dist.models.value import ValueModule
from rlhf_dist.workers.export import export_model
from rlhf_dist.workers.training import build_engine

TOKENS = torch.arange(4, 16).reshape(2, 6)


@pytest.fixture
def sources(tiny_model: Path, tmp_path: Path) -> dict[str, Path]:
    """A Llama, one with tied embeddings, and a GPT-2 (tied, absolute positions)."""
    tied, gpt2 = tmp_path / "tied", tmp_path / "gpt2"
    config = AutoConfig.from_pretrained(tiny_model)
    config.tie_word_embeddings = True
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tied)
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, eos_token_id=2)).save_pretrained(gpt2)
    for folder in (tied, gpt2):
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return {"llama": tiny_model, "tied": tied, "gpt2": gpt2}


def objective(outputs: Any, microbatch: Any) -> Any:
    from rlhf_dist.contracts.tally import Tally

    name = "logprobs_BT" if "logprobs_BT" in outputs else "values_BT"
    return torch.where(microbatch.response_mask_BT, outputs[name], 0.0).sum(), Tally()


def trained_engine(module: Any, section: Any, rank: Any, batch: ExperienceBatch) -> Any:
    engine = build_engine(module, section, rank, Training(section.optim, 10))
    for _ in range(2):
        engine.forward_backward([batch], objective, 20.0)
        engine.optimizer_step()
    return engine


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("source", ["llama", "tied", "gpt2"])
def test_a_policy_loads_with_transformers_and_answers_as_it_did(
    source, stage, lora, sources, zero, plain_rank, shard_of, ragged, tmp_path
) -> None:
    path, folder = str(sources[source]), tmp_path / "new" / "export"
    section = PolicySection(model=path, deepspeed=zero(stage), optim=OptimSection(lr=0.01))
    model: Any = load_causal_lm(section, path)
    if lora:
        model = add_adapter(model, LoraSection(r=2), seed=0)
    engine = trained_engine(PolicyModule(model), section, plain_rank, shard_of(ragged))
    export_model(engine, engine.module.model, load_tokenizer(path), str(folder))
    want = engine.forward([shard_of(ragged)])[0]["logprobs_BT"]
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    again = PolicyModule(loaded.eval())
    got = again(**again.inputs(shard_of(ragged)))["logprobs_BT"]
    torch.testing.assert_close(got.detach(), want, rtol=1e-5, atol=1e-5)
    first = PolicyModule(AutoModelForCausalLM.from_pretrained(path).eval())
    assert not torch.allclose(first(**first.inputs(shard_of(ragged)))["logprobs_BT"], want, atol=1e-2), (
        "training should have moved the model"
    )
    assert (folder / "adapter").is_dir() is lora
    if lora:
        alone = PolicyModule(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), str(folder / "adapter")).eval())
        torch.testing.assert_close(alone(**alone.inputs(shard_of(ragged)))["logprobs_BT"].detach(), want, rtol=1e-5, atol=1e-5)
        assert AutoTokenizer.from_pretrained(folder / "adapter")("w1 w2") == AutoTokenizer.from_pretrained(path)("w1 w2")
    assert loaded.config.use_cache is True and engine.module.model.config.use_cache is False
    assert loaded.config.architectures == AutoConfig.from_pretrained(path).architectures
    assert AutoTokenizer.from_pretrained(folder)("w1 w2")["input_ids"] == AutoTokenizer.from_pretrained(path)("w1 w2")["input_ids"]
    assert sorted(p.suffix for p in folder.iterdir() if p.is_file() and p.suffix not in (".json", ".jinja")) == [".safetensors"]


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("source", ["llama", "gpt2"])
def test_a_value_model_loads_as_a_sequence_classifier(source, stage, sources, zero, plain_rank, shard_of, ragged, tmp_path) -> None:
    path, folder = str(sources[source]), tmp_path / "export"
    section = ValueSection(deepspeed=zero(stage), optim=OptimSection(lr=0.01))
    module = ValueModule(load_token_scorer(section, path, zero_head=True))
    engine = trained_engine(module, section, plain_rank, shard_of(ragged))
    export_model(engine, engine.module.model, load_tokenizer(path), str(folder))
    loaded, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and loaded.config.num_labels == 1
    want = engine.forward([shard_of(ragged)])[0]["bootstrap_value_B"]
    assert want.abs().max() > 1e-3
    with torch.no_grad():
        got = torch.cat([loaded.eval()(input_ids=torch.tensor([prompt + response])).logits[0] for prompt, response in ragged])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert load_token_scorer(section, str(folder), zero_head=False).score.weight.any()  # it can start another run


def test_stop_tokens_and_odd_generation_settings_survive(tiny_model, plain_rank, tmp_path) -> None:
    """Published generation configs name sampling settings without do_sample: transformers reads them and refuses to write them."""
    source, folder = tmp_path / "source", tmp_path / "export"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(source)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(source)
    (source / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 5], "temperature": 0.9, "top_p": 0.6, "do_sample": False})
    )
    section = PolicySection(model=str(source))
    tokenizer = load_tokenizer(str(source))
    engine = build_engine(PolicyModule(load_causal_lm(section, str(source))), section, plain_rank, Training(section.optim, 1))
    export_model(engine, engine.module.model, tokenizer, str(folder))
    assert stop_tokens(str(folder), tokenizer) == stop_tokens(str(source), tokenizer) == (2, 5)
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.9


def test_other_ranks_walk_along_and_write_nothing(tiny_model, tmp_path) -> None:
    class Other:
        rank, walked = 1, 0

        def export_weights(self, merged: bool) -> Any:
            for _ in range(3):
                self.walked += 1
                yield {"x": torch.zeros(1)}

    engine = Other()
    export_model(engine, None, load_tokenizer(str(tiny_model)), str(tmp_path / "nothing"))  # type: ignore[arg-type]
    assert engine.walked == 3 and not (tmp_path / "nothing").exists()


def test_bf16_is_exported_as_bf16(tiny_model, plain_rank, tmp_path) -> None:
    section = PolicySection(model=str(tiny_model), dtype="bf16")
    engine = build_engine(PolicyModule(load_causal_lm(section, section.model)), section, plain_rank, Training(section.optim, 1))
    export_model(engine, engine.module.model, load_tokenizer(section.model), str(tmp_path / "export"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").dtype == torch.bfloat16
