"""Reward models: a batch scores as its rows do alone, whatever the model says about padding; what is no reward model is refused."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
)

from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.models.classifier import ClassifierModule, EncodedTexts, load_classifier

VOCABULARY = 40
TEXTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [39, 2], [2, 2, 2]]


def llama(labels: int = 1, **options) -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, num_labels=labels, initializer_range=0.5, attention_dropout=0.5, **options,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


def gpt2(labels: int = 1, **options) -> GPT2ForSequenceClassification:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=labels, initializer_range=0.5,
        bos_token_id=2, eos_token_id=2, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5, **options,
    )  # fmt: skip
    return GPT2ForSequenceClassification(config).eval()


def encoder(kind=BertForSequenceClassification, config=BertConfig, labels: int = 1, **options):
    torch.manual_seed(2)
    return kind(
        config(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, num_labels=labels, initializer_range=0.5, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5,
            **options,
        )
    ).eval()  # fmt: skip


MODELS = {
    "llama, no pad": llama,
    "llama, pad -1": lambda: llama(pad_token_id=-1),
    "llama, pad = eos": lambda: llama(pad_token_id=2, eos_token_id=2),
    "llama, pad of its own": lambda: llama(pad_token_id=0),
    "gpt2, no pad": gpt2,
    "gpt2, pad = eos": lambda: gpt2(pad_token_id=2),
    "bert": encoder,
    "roberta": lambda: encoder(RobertaForSequenceClassification, RobertaConfig, pad_token_id=1),
}


@pytest.fixture(params=MODELS, scope="module")
def folder(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    MODELS[request.param]().save_pretrained(path)
    return path


def score(module: ClassifierModule, texts: EncodedTexts) -> torch.Tensor:
    with torch.no_grad():
        return module(**module.inputs(texts))["score_B"]


def alone(model: torch.nn.Module, rows: list[list[int]]) -> torch.Tensor:
    """Each row by itself through plain transformers: with nothing padded, nothing can be confused."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])


def test_a_batch_scores_as_its_rows_do_alone_in_plain_transformers(folder: Path) -> None:
    module = load_classifier(EngineSection(), str(folder))
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    together = score(module, EncodedTexts.from_rows(TEXTS))
    assert together.dtype == torch.float32 and together.shape == (len(TEXTS),)
    torch.testing.assert_close(together, alone(plain, TEXTS), rtol=1e-5, atol=1e-5)
    assert together.std() > 0.01, "a model that scores everything alike proves nothing"


def test_what_stands_in_a_padded_slot_changes_nothing(folder: Path) -> None:
    module = load_classifier(EngineSection(), str(folder))
    clean = EncodedTexts.from_rows(TEXTS)
    for poison in (1, 39, 10**6, -7):
        dirty = EncodedTexts(torch.where(clean.mask_BL, clean.tokens_BL, poison), clean.mask_BL)
        assert torch.equal(score(module, dirty), score(module, clean))


def test_the_models_configuration_is_as_before_after_a_call(folder: Path) -> None:
    module = load_classifier(EngineSection(), str(folder))
    before = module.model.config.to_dict()
    score(module, EncodedTexts.from_rows(TEXTS))
    assert module.model.config.to_dict() == before


def test_dropout_is_off_even_in_training_mode(folder: Path) -> None:
    module = load_classifier(EngineSection(), str(folder))
    texts = EncodedTexts.from_rows(TEXTS)
    calm = score(module, texts)
    assert torch.equal(score(module.train(), texts), calm)


def test_a_blank_batch_is_one_row_that_runs(folder: Path) -> None:
    module = load_classifier(EngineSection(), str(folder))
    assert len(module.blank()) == 1
    assert score(module, module.blank()).isfinite().all()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9), min_size=1, max_size=6))
def test_no_content_confuses_the_pooling_of_a_model_without_pad(rows: list[list[int]]) -> None:
    module = ClassifierModule(LLAMA)
    torch.testing.assert_close(score(module, EncodedTexts.from_rows(rows)), alone(LLAMA, rows), rtol=1e-5, atol=1e-5)


LLAMA = llama()


def test_content_that_uses_the_whole_vocabulary_still_pools_at_its_end() -> None:
    module = ClassifierModule(LLAMA)
    rows = [list(range(0, 20)), list(range(20, 40)), [7], list(range(39, 10, -1))]
    torch.testing.assert_close(score(module, EncodedTexts.from_rows(rows)), alone(LLAMA, rows), rtol=1e-5, atol=1e-5)


def test_rows_that_end_in_every_id_are_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        score(ClassifierModule(LLAMA), EncodedTexts.from_rows([[token] for token in range(VOCABULARY)]))


@pytest.mark.parametrize("label", [0, 1, 2])
def test_transforms_of_a_softmax_classifier(label: int) -> None:
    model = llama(labels=3)
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([row])).logits for row in TEXTS])
    probability = logits.softmax(1)[:, label]
    expected = {"logit": logits[:, label], "probability": probability, "log_odds": (probability / (1 - probability)).log()}
    for transform, values in expected.items():
        torch.testing.assert_close(
            score(ClassifierModule(model, label, transform), EncodedTexts.from_rows(TEXTS)), values, rtol=1e-4, atol=1e-5
        )


def test_transforms_of_one_output_and_of_independent_labels() -> None:
    one, many = llama(), llama(labels=3, problem_type="multi_label_classification")
    texts = EncodedTexts.from_rows(TEXTS)
    for model, label in ((one, None), (many, 2)):
        logit = score(ClassifierModule(model, label, "logit"), texts)
        torch.testing.assert_close(score(ClassifierModule(model, label, "probability"), texts), logit.sigmoid())
        torch.testing.assert_close(score(ClassifierModule(model, label, "log_odds"), texts), logit)


def test_log_odds_of_a_certain_model_stay_finite() -> None:
    model = llama(labels=2)
    torch.nn.init.constant_(model.score.weight, 0.0)
    module = ClassifierModule(model, 1, "log_odds")
    logits = torch.tensor([[0.0, 300.0], [300.0, 0.0]])
    assert module._score(logits).tolist() == [300.0, -300.0]


@pytest.mark.parametrize("label, transform", [(None, None), (1, None), (None, "probability")])
def test_several_outputs_need_label_and_transform(tmp_path: Path, label, transform) -> None:
    llama(labels=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has 2 outputs \(0 = LABEL_0, 1 = LABEL_1\)") as caught:
        load_classifier(EngineSection(), str(tmp_path), label=label, transform=transform)
    assert "transform" in caught.value.fix


def test_a_label_that_does_not_exist(tmp_path: Path) -> None:
    llama(labels=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="label 2 does not exist"):
        load_classifier(EngineSection(), str(tmp_path), label=2, transform="logit")


def test_a_language_model_has_no_trained_head_and_is_no_random_reward(tmp_path: Path) -> None:
    LlamaForCausalLM(llama().config).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"not a trained sequence classifier: the folder does not hold score\.weight, which would be random"
    ):
        load_classifier(EngineSection(), str(tmp_path))


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_classifier(EngineSection(), str(tmp_path / "gone"))
    assert caught.value.where == str(tmp_path / "gone")


def test_an_architecture_without_a_classifier(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}', encoding="utf-8")
    with pytest.raises(UserError, match="cannot load the model"):
        load_classifier(EngineSection(), str(tmp_path))


def test_a_folder_without_weights(tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot load the model"):
        load_classifier(EngineSection(), str(tmp_path))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = llama()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load the model") as caught:
        load_classifier(EngineSection(), str(tmp_path))
    assert "safetensors" in caught.value.fix


def test_a_model_that_answers_a_logit_a_token_is_refused() -> None:
    model = llama()
    model.forward = lambda **inputs: type("Output", (), {"logits": torch.zeros(*inputs["input_ids"].shape, 1)})()
    with pytest.raises(UserError, match=r"logits of shape \(1, 3, 1\) for 1 sequences"):
        score(ClassifierModule(model), EncodedTexts.from_rows([[1, 2, 3]]))


def test_bf16_weights_give_fp32_scores(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    module = load_classifier(EngineSection(dtype="bf16"), str(tmp_path))
    assert next(module.parameters()).dtype == torch.bfloat16
    assert score(module, EncodedTexts.from_rows(TEXTS)).dtype == torch.float32


def test_the_limit_is_the_models_context_and_never_more() -> None:
    module = ClassifierModule(llama())
    assert (module.input_limit(None), module.input_limit(7)) == (32, 7)
    with pytest.raises(UserError, match="max_tokens is 33, but the reward model's context is 32 tokens"):
        module.input_limit(33)


def test_robertas_positions_start_behind_its_padding_index() -> None:
    module = ClassifierModule(MODELS["roberta"]())
    limit = module.input_limit(None)
    assert limit == 30
    assert score(module, EncodedTexts.from_rows([[5] * limit])).isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        score(module, EncodedTexts.from_rows([[5] * (limit + 1)]))


def test_a_model_without_a_fixed_context_has_no_limit() -> None:
    model = AutoModelForSequenceClassification.from_config(
        T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, num_labels=1, pad_token_id=0, eos_token_id=1
        )
    )
    assert ClassifierModule(model).input_limit(None) is None


def test_rows_are_selected_with_the_padding_that_they_still_need() -> None:
    texts = EncodedTexts.from_rows(TEXTS, truncated=1)
    assert texts.lengths == [3, 1, 6, 2, 3] and len(texts) == 5
    chosen = texts.select([3, 0])
    assert chosen.tokens_BL.tolist() == [[39, 2, 0], [5, 6, 7]]
    assert chosen.mask_BL.tolist() == [[True, True, False], [True, True, True]]
    assert chosen.truncated == 0 and texts.select([]).tokens_BL.shape == (0, 0)
    assert EncodedTexts.from_rows([]).lengths == [] and math.prod(EncodedTexts.from_rows([[]]).mask_BL.shape) == 0


def test_in_half_precision_inputs_have_even_widths_within_the_context(tmp_path: Path) -> None:
    """Attention kernels round differently at odd widths: a row would depend on how long its neighbours are."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=1, pad_token_id=0,
        max_position_embeddings=40,
    )  # fmt: skip
    module = ClassifierModule(LlamaForSequenceClassification(config).bfloat16().eval())
    for length, wide in ((3, 16), (32, 32), (33, 40)):
        given = module.inputs(EncodedTexts.from_rows([[5] * length]))["tokens"]
        assert given["input_ids"].shape == given["attention_mask"].shape == (1, wide) and int(given["attention_mask"].sum()) == length
    one, long = [3, 4, 5], [6] * 30
    with torch.no_grad():
        alone = module(**module.inputs(EncodedTexts.from_rows([one])))["score_B"]
        together = module(**module.inputs(EncodedTexts.from_rows([one, long])))["score_B"]
    assert torch.allclose(alone[0], together[0], atol=1e-3)


DECODERS = [name for name in MODELS if name.split(",")[0] in ("llama", "gpt2")]


@pytest.mark.parametrize("name", DECODERS)
def test_packed_texts_score_as_they_do_alone_in_plain_transformers(name: str) -> None:
    """Also texts that end in the model's own pad, which its pooling passes over."""
    module = ClassifierModule(MODELS[name](), packing=True)
    texts = [*TEXTS, [5, 0, 7, 0], [6, 2, 2]]
    together = score(module, EncodedTexts.from_rows(texts))
    assert module.inputs(EncodedTexts.from_rows(texts))["tokens"]["input_ids"].shape == (4, 6), "seven texts in four rows"
    torch.testing.assert_close(together, alone(module.model, texts), rtol=1e-5, atol=1e-5)
    clean = EncodedTexts.from_rows(texts)
    dirty = EncodedTexts(torch.where(clean.mask_BL, clean.tokens_BL, 10**6), clean.mask_BL)
    assert torch.equal(score(module, dirty), together)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(st.integers(0, 39), min_size=1, max_size=9), min_size=1, max_size=8))
def test_packed_texts_score_as_padded_ones(texts: list[list[int]]) -> None:
    padded, packed = PADDED_AND_PACKED
    one, other = (score(module, EncodedTexts.from_rows(texts)) for module in (padded, packed))
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


PADDED_AND_PACKED = [ClassifierModule(llama(3, pad_token_id=2), 1, "probability", packing=packing) for packing in (False, True)]


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_an_encoder_cannot_be_packed(name: str) -> None:
    with pytest.raises(UserError, match="cannot be packed: its scores do not come of a layer named `score`") as caught:
        ClassifierModule(MODELS[name](), packing=True)
    assert "packing: false" in caught.value.fix


@pytest.mark.parametrize("kind", ["mean", "scaled"])
def test_a_model_with_another_pooling_cannot_be_packed(kind: str) -> None:
    """One that averages over the text, and one that does more with what its head says."""
    model = llama()

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        hidden = model.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        mask = attention_mask.unsqueeze(-1)
        rows = torch.arange(len(input_ids))
        pooled = (hidden * mask).sum(1) / mask.sum(1) if kind == "mean" else hidden[rows, attention_mask.sum(1) - 1]
        logits = model.score(pooled)
        return SimpleNamespace(logits=logits if kind == "mean" else 2 * logits)

    model.forward = forward
    ClassifierModule(model)
    with pytest.raises(UserError, match=r"LlamaForSequenceClassification cannot be packed: its scores are .* off in packed rows"):
        ClassifierModule(model, packing=True)


def test_a_leak_between_texts_is_refused() -> None:
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
    }
    with pytest.raises(UserError, match="OPTForSequenceClassification cannot be packed: sequences in one row see each other"):
        ClassifierModule(OPTForSequenceClassification(OPTConfig(**sizes, num_labels=1)).eval(), packing=True)


def test_the_config_of_an_engine_says_whether_it_packs(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    assert load_classifier(EngineSection(packing=True), str(tmp_path)).packing
    assert not load_classifier(EngineSection(), str(tmp_path)).packing


def test_a_packed_model_in_half_precision(tmp_path: Path) -> None:
    model = llama().bfloat16()
    padded, packed = ClassifierModule(model), ClassifierModule(model, packing=True)
    texts = EncodedTexts.from_rows(TEXTS)
    assert packed.inputs(texts)["tokens"]["input_ids"].shape == (1, 16)
    torch.testing.assert_close(score(packed, texts), score(padded, texts), rtol=5e-2, atol=5e-2)
