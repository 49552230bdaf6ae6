"""Loading: stop tokens from both configs, dropout really off, and every broken folder refused at once with its cause."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.models.loading import (
    context_length,
    load_causal_lm,
    load_config,
    load_token_scorer,
    load_tokenizer,
    load_tokenizer_folder,
    stop_tokens,
    switch_dropout_off,
)

SECTION = EngineSection()
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = SIZES | {"intermediate_size": 16, "max_position_embeddings": 32}


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(LLAMA | options)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete Llama without a tokenizer."""
    llama().save_pretrained(tmp_path)
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in (values | changes).items() if value != "gone"}))


class Tokenizer:
    """All that `stop_tokens` asks of one."""

    def __init__(self, eos: int | None) -> None:
        self.eos_token_id = eos


# --- what loads -------------------------------------------------------------------------------------------------------------------------


def test_a_model_comes_with_its_weights_in_the_wanted_precision_and_in_eval_mode(folder: Path) -> None:
    model = load_causal_lm(SECTION, str(folder))
    assert not model.training and model.dtype == torch.float32 and model.config.use_cache is False
    for name, weight in llama().named_parameters():
        assert torch.equal(model.get_parameter(name), weight)
    assert load_causal_lm(EngineSection(dtype="bf16"), str(folder)).dtype == torch.bfloat16


def test_the_row_of_a_pad_that_is_also_the_eos_learns(pad_is_eos: Any) -> None:
    """transformers keeps the pad's row of the embeddings without gradient; texts hold the eos."""
    model = load_causal_lm(EngineSection(), str(pad_is_eos()))
    model(input_ids=torch.tensor([[1, 5, 2, 6]]), labels=torch.tensor([[1, 5, 2, 6]])).loss.backward()
    assert bool(model.get_input_embeddings().weight.grad[2].any())  # type: ignore[operator]


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert isinstance(load_causal_lm(SECTION, f"~/{folder.name}"), LlamaForCausalLM)


def test_a_real_model_and_its_tokenizer(shared: Path) -> None:
    path = str(shared / "models" / "stories260K")
    tokenizer = load_tokenizer(path)
    model = load_causal_lm(SECTION, path)
    with torch.no_grad():
        loss = model(**(given := tokenizer("Once upon a time, there was a little", return_tensors="pt")), labels=given["input_ids"]).loss
    assert loss < 2.5  # nats a token; an untrained model of this vocabulary has 6.2


# --- stop tokens ------------------------------------------------------------------------------------------------------------------------


def test_a_real_generation_config_names_two_stop_tokens_and_the_config_one(shared: Path) -> None:
    path = str(shared / "models" / "stories260K")
    assert stop_tokens(path, load_tokenizer(path)) == (1, 2)


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "wanted"),
    [
        (7, [5, 3], 9, (3, 5, 7)),
        ([7, 5], 5, 9, (5, 7)),
        (7, None, 9, (7,)),
        ("gone", [5], 9, (5,)),
        ("gone", "gone", 9, (9,)),
        ("gone", "gone", None, ()),
    ],
)
def test_stop_tokens_are_the_union_and_the_tokenizer_speaks_last(folder, config, generation, tokenizer, wanted) -> None:
    edit(folder / "config.json", eos_token_id=config)
    if generation is None:
        (folder / "generation_config.json").unlink()
    else:
        edit(folder / "generation_config.json", eos_token_id=generation)
    if config == "gone":
        edit(folder / "config.json", eos_token_id=None)
    assert stop_tokens(str(folder), Tokenizer(tokenizer)) == wanted


def test_a_generation_config_that_cannot_be_read_is_no_missing_one(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json"):
        stop_tokens(str(folder), Tokenizer(2))


# --- tokenizers -------------------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_pad_token_is_left_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    AutoConfig.from_pretrained(tiny_model).save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token is None and loaded("w1 w2")["input_ids"] == tokenizer("w1 w2")["input_ids"]


def test_a_tokenizer_may_stand_alone_if_asked_for_alone(tiny_model: Path, tmp_path: Path) -> None:
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path)
    assert load_tokenizer_folder(str(tmp_path)).eos_token == "</s>"
    with pytest.raises(UserError, match="configuration"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0", "added_tokens": [], "model": {"type": "Unheard"}}'])
def test_a_folder_without_a_readable_tokenizer_is_refused(folder: Path, content: str | None) -> None:
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="tokenizer") as caught:
        load_tokenizer(str(folder))
    assert caught.value.where == str(folder) and "tokenizer.json" in caught.value.fix


# --- broken folders ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["./nothing", "/nothing/here", "nothing", "~/nothing", "a/b/c", ""])
def test_a_missing_folder_is_named(path: str) -> None:
    with pytest.raises(UserError, match=r"no model folder|neither a folder") as caught:
        load_config(path)
    assert caught.value.where == path and caught.value.fix


def test_a_misspelt_relative_folder_is_refused_without_asking_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks like a hub name: a look-up with its retries would take half a minute."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    began = time.perf_counter()
    with pytest.raises(UserError, match="neither a folder") as caught:
        load_causal_lm(SECTION, "models/storys")
    assert time.perf_counter() - began < 5 and "hf download models/storys" in caught.value.fix


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def with_half_a_file(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])


def without_one_weight(folder: Path) -> None:
    model = llama()
    weights = model.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(folder, state_dict=weights)


def without_one_shard(folder: Path) -> None:
    without_weights(folder)
    llama().save_pretrained(folder, max_shard_size="5KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def with_pickled_weights(folder: Path) -> None:
    without_weights(folder)
    torch.save(llama().state_dict(), folder / "pytorch_model.bin")


def with_another_width(folder: Path) -> None:
    edit(folder / "config.json", hidden_size=32)


def with_a_width_in_words(folder: Path) -> None:
    edit(folder / "config.json", hidden_size="sixteen")


def with_an_unknown_architecture(folder: Path) -> None:
    edit(folder / "config.json", model_type="unheard")


def with_broken_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def as_encoder_decoder(folder: Path) -> None:
    T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(folder)


def as_encoder(folder: Path) -> None:
    BertForMaskedLM(BertConfig(**SIZES, intermediate_size=16)).save_pretrained(folder)


def as_classifier(folder: Path) -> None:
    LlamaForSequenceClassification(LlamaConfig(**LLAMA)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (without_weights, "no file named model.safetensors"),
        (with_half_a_file, "cannot load the model"),
        (without_one_weight, r"1 weights are not in the folder, model\.layers\.1\.mlp\.up_proj\.weight first"),
        (without_one_shard, "model-00002-of"),
        (with_pickled_weights, "model.safetensors"),
        (with_another_width, "another shape than the configuration says"),
        (with_a_width_in_words, "hidden_size"),
        (with_an_unknown_architecture, "unheard"),
        (with_broken_json, "not a valid JSON"),
        (as_encoder_decoder, "AutoModelForCausalLM"),
        (as_encoder, "bert is an encoder, not a causal LM"),
        (as_classifier, "lm_head.weight"),
    ],
)
def test_a_broken_folder_is_refused_with_its_cause(folder: Path, broken: Any, said: str) -> None:
    broken(folder)
    began = time.perf_counter()
    with pytest.raises(UserError, match=said) as caught:
        load_causal_lm(SECTION, str(folder))
    assert time.perf_counter() - began < 10 and caught.value.where == str(folder) and caught.value.fix


# --- value models -----------------------------------------------------------------------------------------------------------------------


def test_a_value_model_starts_from_a_causal_lm_with_its_head_at_zero(folder: Path) -> None:
    model = load_token_scorer(SECTION, str(folder), zero_head=True)
    assert model.score.weight.shape == (1, 16) and not model.score.weight.any() and not model.training
    assert torch.equal(model.model.embed_tokens.weight, llama().model.embed_tokens.weight)


@pytest.mark.parametrize("labels", [1, 3])
def test_a_value_model_starts_from_a_reward_model_whatever_its_labels(tmp_path: Path, labels: int) -> None:
    LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=labels)).save_pretrained(tmp_path)
    assert not load_token_scorer(SECTION, str(tmp_path), zero_head=True).score.weight.any()
    if labels == 1:
        assert load_token_scorer(SECTION, str(tmp_path), zero_head=False).score.weight.any()
        return
    with pytest.raises(UserError, match=r"score\.weight"):
        load_token_scorer(SECTION, str(tmp_path), zero_head=False)


def test_a_head_to_keep_must_be_there(folder: Path) -> None:
    with pytest.raises(UserError, match=r"score\.weight"):
        load_token_scorer(SECTION, str(folder), zero_head=False)


@pytest.mark.parametrize("broken", [as_encoder_decoder, as_encoder])
def test_a_value_model_needs_a_decoder(tmp_path: Path, broken: Any) -> None:
    broken(tmp_path)
    with pytest.raises(UserError):
        load_token_scorer(SECTION, str(tmp_path), zero_head=True)


def test_an_architecture_without_a_linear_score_head_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=1)).save_pretrained(tmp_path)
    loaded = load_token_scorer(SECTION, str(tmp_path), zero_head=False)
    loaded.score = nn.Identity()
    monkeypatch.setattr("rlhf_dist.models.loading.load_pretrained", lambda *_, **__: loaded)
    with pytest.raises(UserError, match="no linear `score` head"):
        load_token_scorer(SECTION, str(tmp_path), zero_head=True)


# --- dropout ----------------------------------------------------------------------------------------------------------------------------

DROPPING = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)),
    "gpt2 eager": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, attn_implementation="eager")),
    "llama": lambda: llama(attention_dropout=0.5),
    "llama eager": lambda: llama(attention_dropout=0.5, attn_implementation="eager"),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**SIZES, ffn_dim=16, word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.5, activation_dropout=0.5, layerdrop=0.5)
    ),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**SIZES, hidden_dropout=0.5, attention_dropout=0.5)),
    "gpt-neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
            embed_dropout=0.5, attention_dropout=0.5, resid_dropout=0.5,
        )
    ),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=16, hidden_dropout=0.5, attention_dropout=0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPPING)
def test_without_dropout_training_mode_computes_what_eval_mode_does(name: str) -> None:
    torch.manual_seed(0)
    model = DROPPING[name]()
    tokens = torch.arange(12).reshape(2, 6)

    def logits(training: bool) -> torch.Tensor:
        return model.train(training)(input_ids=tokens).logits.detach()

    assert not torch.equal(logits(True), logits(True)), "the model of this test should drop"
    expected = logits(False)
    switch_dropout_off(model)
    for _ in range(4):
        assert torch.equal(logits(True), expected)


def test_a_loaded_gpt2_gives_the_same_twice_in_training_mode(tmp_path: Path) -> None:
    DROPPING["gpt2"]().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).resid_pdrop == 0.1
    for model in (load_causal_lm(SECTION, str(tmp_path)), load_token_scorer(SECTION, str(tmp_path), zero_head=True)):
        model.train()
        first, second = (model.base_model(torch.arange(8)[None]).last_hidden_state for _ in range(2))
        assert torch.equal(first, second)


# --- facts ------------------------------------------------------------------------------------------------------------------------------


def test_the_context_is_read_whatever_its_name() -> None:
    assert context_length(GPT2Config(n_positions=77)) == 77
    assert context_length(LlamaConfig(max_position_embeddings=99)) == 99
    assert context_length(FalconConfig(alibi=True, max_position_embeddings=0)) is None
    assert context_length(object()) is None
