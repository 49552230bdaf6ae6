"""Adapter folders that peft saved: merged as peft merges them, found with base model and tokenizer, refused with the cause."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.models.adapters import CONFIG, WEIGHTS, find_adapter, merge_adapter
from rlhf_dist.models.classifier import load_classifier
from rlhf_dist.models.linear4bit import Linear4bit
from rlhf_dist.models.loading import (
    check_loadable,
    load_causal_lm,
    load_config,
    load_merged,
    load_token_scorer,
    load_tokenizer,
    stop_tokens,
)

SECTION = EngineSection()
TOKENS = torch.arange(4, 12)[None]


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to move and change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


def saved(base: Path, folder: Path, model: Any = None, **options: Any) -> Any:
    """An adapter with random matrices on a base model, saved by peft; returns the model it adapts."""
    model = model or AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(**({"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options))
    torch.manual_seed(1)
    adapted = get_peft_model(model, config).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(str(folder))
    return adapted


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- merging ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"layers.1.mlp.up_proj": 40}},
        {"target_modules": ["embed_tokens", "v_proj", "lm_head"]},
        {"modules_to_save": ["norm"]},
    ],
)
def test_an_adapter_folder_is_a_model(options: Any, base: Path, tmp_path: Path) -> None:
    want = logits(saved(base, tmp_path / "adapter", **options))
    model: Any = load_causal_lm(SECTION, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(want, logits(AutoModelForCausalLM.from_pretrained(base)), atol=0.02), "the adapter should change something"
    assert not any("lora" in name for name, _ in model.named_modules()) and model.name_or_path == str(tmp_path / "adapter")


def test_transposed_layers(tmp_path: Path, tiny_config: Any) -> None:
    AutoModelForCausalLM.from_config(tiny_config("gpt2")).save_pretrained(tmp_path / "base")
    want = logits(saved(tmp_path / "base", tmp_path / "adapter", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True))
    torch.testing.assert_close(logits(load_causal_lm(SECTION, str(tmp_path / "adapter"))), want, rtol=1e-5, atol=1e-5)


def test_in_half_precision_the_sum_is_rounded_once(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter")
    model: Any = load_causal_lm(EngineSection(dtype="bf16"), str(tmp_path / "adapter"))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).double()
    exact = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).double().merge_and_unload().state_dict()
    nearest = torch.cat([(weight == exact[name].bfloat16()).flatten() for name, weight in model.state_dict().items()])
    assert float(nearest.float().mean()) > 0.999  # summed in fp32, so that a tie may fall the other way


def test_an_adapter_with_a_head_is_a_classifier(base: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    want = logits(saved(base, tmp_path / "adapter", model, task_type="SEQ_CLS"))
    module = load_classifier(SECTION, str(tmp_path / "adapter"), 2, "logit")
    torch.testing.assert_close(logits(module.model), want, rtol=1e-5, atol=1e-5)
    config = load_config(str(tmp_path / "adapter"))
    assert config.num_labels == 3 and config.architectures == ["LlamaForSequenceClassification"]
    fresh: Any = load_token_scorer(SECTION, str(tmp_path / "adapter"), zero_head=True)
    assert fresh.score.weight.shape == (1, 32) and not fresh.score.weight.any()
    assert torch.equal(fresh.model.layers[0].mlp.up_proj.weight, module.model.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(UserError, match=r"another base model: it holds score\.weight, which this model lacks"):
        load_causal_lm(SECTION, str(tmp_path / "adapter"))


def test_a_value_model_starts_from_a_policys_adapter_without_its_head(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    scorer: Any = load_token_scorer(SECTION, str(tmp_path / "adapter"), zero_head=True)
    policy: Any = load_causal_lm(SECTION, str(tmp_path / "adapter"))
    assert torch.equal(scorer.model.layers[1].self_attn.q_proj.weight, policy.model.layers[1].self_attn.q_proj.weight)


def test_it_is_merged_before_it_is_quantised(wide_model: Path, tmp_path: Path) -> None:
    saved(wide_model, tmp_path / "adapter")
    section = EngineSection(quantize="nf4")
    both: Any = load_causal_lm(section, str(tmp_path / "adapter"))
    load_merged(find_adapter(str(tmp_path / "adapter"))).save_pretrained(tmp_path / "merged")
    assert isinstance(both.model.layers[0].mlp.up_proj, Linear4bit)
    assert torch.equal(logits(both), logits(load_causal_lm(section, str(tmp_path / "merged"))))


def test_an_adapter_on_tied_embeddings_is_refused(base: Path, tmp_path: Path) -> None:
    other(base, tie_word_embeddings=True)
    saved(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    with pytest.raises(UserError, match=r"changes model\.embed_tokens, which is tied to the head"):
        load_causal_lm(SECTION, str(tmp_path / "adapter"))


# --- base model and tokenizer -----------------------------------------------------------------------------------------------------------


def test_the_base_is_found_from_here_or_from_the_adapter(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(base, tmp_path / "adapter")
    for named, here in (("base", tmp_path), ("../base", tmp_path.parent), (str(base), tmp_path.parent)):
        edited(tmp_path / "adapter" / CONFIG, base_model_name_or_path=named)
        monkeypatch.chdir(here)
        assert isinstance(load_config(str(tmp_path / "adapter")), type(AutoConfig.from_pretrained(base)))


def test_a_base_that_is_gone_or_unnamed(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter")
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="the adapter's base model cannot be used: there is no model folder") as caught:
        load_causal_lm(SECTION, str(tmp_path / "adapter"))
    assert str(base) in caught.value.where and "base_model_name_or_path" in caught.value.fix
    edited(tmp_path / "adapter" / CONFIG, base_model_name_or_path=None)
    with pytest.raises(UserError, match="does not name its base model"):
        load_config(str(tmp_path / "adapter"))
    adapter = find_adapter(str(tmp_path / "adapter"), str(tmp_path / "moved"))
    assert adapter is not None and logits(load_merged(adapter)).isfinite().all()


def test_an_adapter_on_an_adapter_folder(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "first")
    saved(base, tmp_path / "second")
    edited(tmp_path / "second" / CONFIG, base_model_name_or_path=str(tmp_path / "first"))
    with pytest.raises(UserError, match="is itself an adapter"):
        load_causal_lm(SECTION, str(tmp_path / "second"))


def test_tokenizer_and_stop_tokens_are_the_adapters_or_its_bases(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    path = str(tmp_path / "adapter")
    tokenizer: Any = load_tokenizer(path)
    assert stop_tokens(path, tokenizer) == (2, 5) and len(tokenizer) == 64
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(path)
    assert len(load_tokenizer(path)) == 65


def test_a_folder_with_whole_weights_is_no_adapter(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter")
    shutil.copy(tmp_path / "adapter" / CONFIG, base)
    assert find_adapter(str(base)) is None and find_adapter(str(tmp_path / "nowhere")) is None
    assert find_adapter("no/such-hub-name") is None and find_adapter("a strange/n@me") is None


# --- what does not fit ------------------------------------------------------------------------------------------------------------------


def other(base: Path, **changes: Any) -> None:
    config = AutoConfig.from_pretrained(base)
    config.update(changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 1}, r"it adapts model\.layers\.1\.mlp\.down_proj, and this model has no such layer"),
        ({"intermediate_size": 128}, r"its model\.layers\.0\.mlp\.down_proj\.lora_A\.weight is made for size 64, this model has 128"),
        (
            {"hidden_size": 64, "head_dim": 8},
            r"its model\.layers\.0\.mlp\.down_proj\.lora_B\.weight is made for size 32, this model has 64",
        ),
    ],
)
def test_another_base_model_is_named_with_the_first_layer(changes: Any, said: str, base: Path, tmp_path: Path) -> None:
    """Before weights are loaded, and when they are."""
    saved(base, tmp_path / "adapter")
    other(base, **changes)
    for load in (
        lambda: load_causal_lm(SECTION, str(tmp_path / "adapter")),
        lambda: check_loadable(AutoModelForCausalLM, SECTION, str(tmp_path / "adapter"), on_gpu=False),
    ):
        with pytest.raises(UserError, match=f"the adapter was made for another base model: {said}") as caught:
            load()
        assert str(base) in caught.value.where


def test_a_sound_adapter_passes_the_check_and_so_does_a_classifiers(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    check_loadable(AutoModelForCausalLM, SECTION, str(tmp_path / "adapter"), on_gpu=False)
    check_loadable(AutoModelForSequenceClassification, SECTION, str(tmp_path / "adapter"), on_gpu=False)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    saved(base, tmp_path / "judge", model, task_type="SEQ_CLS")
    check_loadable(AutoModelForSequenceClassification, SECTION, str(tmp_path / "judge"), on_gpu=False)


def test_half_an_adapter(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    tensors.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight")
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    with pytest.raises(UserError, match="holds only lora_A of a layer") as caught:
        load_causal_lm(SECTION, str(tmp_path / "adapter"))
    assert caught.value.where == "model.layers.1.mlp.up_proj"


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def _cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (_pickled, "the adapter's weights are pickled"),
        (_cut, "cannot read the adapter's weights"),
        (lambda folder: (folder / WEIGHTS).unlink(), "the adapter has no weights"),
        (lambda folder: (folder / CONFIG).write_text("{"), "cannot read the adapter's configuration"),
        (lambda folder: (folder / CONFIG).write_text("{}"), "no configuration of a peft adapter"),
        (lambda folder: edited(folder / CONFIG, use_dora=True), "the adapter uses use_dora, which is more than LoRA"),
        (lambda folder: edited(folder / CONFIG, init_lora_weights="pissa"), "uses init_lora_weights=pissa"),
        (lambda folder: edited(folder / CONFIG, what_a_later_peft_adds=2), "uses what_a_later_peft_adds"),
    ],
)
def test_a_broken_adapter_is_refused_with_its_cause(broken: Any, said: str, base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter")
    broken(tmp_path / "adapter")
    with pytest.raises(UserError, match=said) as caught:
        load_causal_lm(SECTION, str(tmp_path / "adapter"))
    assert caught.value.fix and str(tmp_path / "adapter") in caught.value.where


def test_another_kind_of_adapter(base: Path, tmp_path: Path) -> None:
    config = VeraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="of the kind VERA; only LoRA is read") as caught:
        load_causal_lm(SECTION, str(tmp_path / "adapter"))
    assert "merge_and_unload" in caught.value.fix


def test_what_is_fresh_is_left_alone(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "adapter", modules_to_save=["norm"])
    adapter = find_adapter(str(tmp_path / "adapter"))
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    assert adapter is not None
    merge_adapter(model, adapter, {"model.norm.weight"})
    assert torch.equal(model.model.norm.weight, torch.ones(32))
