"""Reward models in the making: a pad that no text holds, a head of the right size, and scores that plain transformers repeats."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf_dist.config.engines import EngineSection, LoraSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.preferences import PreferenceBatch
from rlhf_dist.data.answer_batches import collate_answers
from rlhf_dist.data.answers import AnswersRow
from rlhf_dist.data.token_rows import TokenRow
from rlhf_dist.models.loading import load_token_scorer, load_tokenizer
from rlhf_dist.models.lora import add_adapter, named_weights
from rlhf_dist.models.reward_model import PAD, RewardModelModule, has_head, load_reward_model, separate_pad, tokenizer_for
from rlhf_dist.models.value import ValueModule

SECTION = EngineSection()
VOCABULARY = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<end>": 4, "w": 5}


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(tokenizer_models.WordLevel(VOCABULARY, unk_token="<unk>"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.mark.parametrize(
    ("pad", "stops"),
    [(None, (2,)), ("</s>", (2,)), ("<unk>", (2,)), ("<s>", (2,)), ("<end>", (2, 4))],
    ids=["none", "eos", "unk", "bos", "a stop token"],
)
def test_a_pad_that_may_stand_in_a_text_gives_way_to_a_token_of_its_own(pad: str | None, stops: tuple[int, ...]) -> None:
    made = tokenizer(**({"pad_token": pad} if pad else {}))
    assert separate_pad(made, stops) == 6 == made.pad_token_id
    assert (made.pad_token, made.padding_side, made.eos_token_id, len(made)) == (PAD, "right", 2, 7)


@pytest.mark.parametrize(("pad", "number"), [("<pad>", 0), ("<end>", 4)])
def test_a_pad_of_its_own_stays(pad: str, number: int) -> None:
    made = tokenizer(pad_token=pad, padding_side="left")
    assert separate_pad(made, (2,)) == number
    assert (made.pad_token, made.padding_side, len(made)) == (pad, "right", 6)


def test_a_word_that_serves_as_pad_gives_way(tmp_path: Path) -> None:
    """As `pad_token_id = some ordinary id` in a tokenizer's config would have it."""
    made: Any = tokenizer()
    made._special_tokens_map["pad_token"] = "w"
    assert made.pad_token_id == 5 and separate_pad(made, (2,)) == 6


def test_the_head_starts_small_and_from_its_seed(tiny_model: Path) -> None:
    heads = [load_reward_model(SECTION, str(tiny_model), 0, seed).score.weight for seed in (0, 0, 1)]  # type: ignore[union-attr]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    wide = torch.cat([load_reward_model(SECTION, str(tiny_model), 0, seed).score.weight for seed in range(20)])  # type: ignore[union-attr]
    assert float(wide.std()) == pytest.approx(1 / math.sqrt(33), rel=0.09)
    bf16: Any = load_reward_model(EngineSection(dtype="bf16"), str(tiny_model), 0, 0)
    assert torch.equal(bf16.score.weight, heads[0].bfloat16())


@pytest.mark.parametrize("tied", [False, True])
def test_the_embeddings_grow_only_for_a_pad_they_lack(tiny_model: Path, tmp_path: Path, tied: bool) -> None:
    policy = AutoModelForCausalLM.from_pretrained(tiny_model, tie_word_embeddings=tied)
    policy.save_pretrained(tmp_path)
    rows = policy.config.vocab_size
    same: Any = load_reward_model(SECTION, str(tmp_path), 0, 0)
    assert same.get_input_embeddings().num_embeddings == rows and same.config.pad_token_id == 0
    assert torch.equal(same.get_input_embeddings().weight, policy.get_input_embeddings().weight)
    grown: Any = load_reward_model(SECTION, str(tmp_path), rows, 0)
    weight = grown.get_input_embeddings().weight
    assert torch.equal(weight[:rows], policy.get_input_embeddings().weight) and not weight[rows:].any() and len(weight) == rows + 1
    assert grown.config.pad_token_id == rows and grown.config.vocab_size == rows + 1 and weight.requires_grad


def test_a_classifier_keeps_its_head_and_several_labels_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    first: Any = load_reward_model(SECTION, str(tiny_model), 0, 3)
    first.save_pretrained(tmp_path / "one")
    again: Any = load_reward_model(SECTION, str(tmp_path / "one"), 0, 99)
    assert torch.equal(again.score.weight, first.score.weight) and has_head(SECTION, str(tmp_path / "one"))
    assert not has_head(SECTION, str(tiny_model))
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3).save_pretrained(tmp_path / "three")
    with pytest.raises(UserError, match="has 3 labels"):
        load_reward_model(SECTION, str(tmp_path / "three"), 0, 0)


def test_an_adapter_of_a_language_model_gets_a_new_head_on_its_own_backbone(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    model: Any = load_reward_model(SECTION, str(tmp_path / "adapter"), 0, 3)
    plain: Any = load_reward_model(SECTION, str(tiny_model), 0, 3)
    assert torch.equal(model.score.weight, plain.score.weight)
    merged = adapted.merge_and_unload()
    assert torch.allclose(model.model.layers[0].self_attn.q_proj.weight, merged.model.layers[0].self_attn.q_proj.weight, atol=1e-6)
    assert not torch.allclose(model.model.layers[0].self_attn.q_proj.weight, plain.model.layers[0].self_attn.q_proj.weight, atol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [RewardModelModule, ValueModule])
def test_embeddings_can_be_adapted(kind: Any, tied: bool, pad_is_eos: Any) -> None:
    """A classifier has no output head that they could be tied to: merged, they answer as trained."""
    model = load_reward_model(SECTION, str(pad_is_eos(tied)), 64, 0)
    adapted: Any = add_adapter(model, LoraSection(r=2, target_modules=["embed_tokens", "q_proj"]), 0, head="score")
    kind(adapted)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    merged: Any = load_reward_model(SECTION, str(pad_is_eos(tied)), 64, 1)
    plain = merged.get_input_embeddings().weight.clone()
    merged.load_state_dict({name: compute() for name, _, compute in named_weights(adapted)})
    assert not torch.allclose(merged.get_input_embeddings().weight, plain, atol=0.1)
    texts = batch(TEXTS)
    with torch.no_grad():
        got, want = (RewardModelModule(each)(**RewardModelModule(each).inputs(texts))["score_B"] for each in (merged, adapted))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_classifier_that_is_no_decoder_is_refused_for_what_it_is(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="of the kind bert has no linear `score` head, as trained reward and value models need") as caught:
        load_reward_model(SECTION, str(tmp_path), 0, 0)
    assert caught.value.where == str(tmp_path) and "decoder-only" in caught.value.fix and "value" not in caught.value.fix


@pytest.mark.parametrize(("stage", "size", "number"), [("reward", 65, 64), ("value", 64, 2)])
def test_the_tokenizer_of_a_model_that_was_trained_from_another(stage: str, size: int, number: int, pad_is_eos: Any) -> None:
    """A reward model's has the pad that was added; a value model's is its base's."""
    path = str(pad_is_eos())
    model: Any = load_reward_model(SECTION, path, 64, 0) if stage == "reward" else load_token_scorer(SECTION, path, zero_head=True)
    made = tokenizer_for(model.config, path)
    assert (len(made), made.pad_token_id) == (size, number)


def test_gpt2_whose_pad_is_its_eos_scores_the_eos(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=6, n_embd=16, n_layer=1, n_head=2, n_positions=16, num_labels=1, bos_token_id=2, eos_token_id=2)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    made = tokenizer(pad_token="</s>")
    pad = separate_pad(made, (2,))
    module = RewardModelModule(load_reward_model(SECTION, str(tmp_path), pad, 0))  # type: ignore[arg-type]
    scores = module(**module.inputs(batch([[5, 2], [5]])))["score_B"]
    assert abs(float(scores[0] - scores[1])) > 1e-4, "the eos is read"


def batch(texts: list[list[int]], garbage: int = 0, extra: int = 0) -> PreferenceBatch:
    """The texts as the answers to one prompt, `garbage` in their padding."""
    rows = tuple(TokenRow(np.array(text, np.int32), np.arange(len(text)) > 0) for text in texts)
    made = collate_answers([AnswersRow(rows, 0, "s")])
    tokens, mask = (torch.nn.functional.pad(each, (0, extra)) for each in (made.tokens_NL, made.mask_NL))
    return PreferenceBatch(torch.where(mask, tokens, garbage), mask, made.answers_BK, made.mask_BK, *list(vars(made).values())[4:])


TEXTS = [[1, 5, 6, 7, 2], [1, 8, 2], [1, 9, 10, 11, 12, 13, 2], [1, 2]]


@pytest.fixture(scope="module")
def module(tiny_model: Path) -> RewardModelModule:
    return RewardModelModule(load_reward_model(SECTION, str(tiny_model), 0, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(("garbage", "extra"), [(0, 0), (2, 0), (10**9, 0), (-1, 0), (7, 9)])
def test_padding_changes_no_score_and_no_gradient(module: RewardModelModule, garbage: int, extra: int) -> None:
    def scores_and_gradient(texts: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        module.zero_grad()
        scores = module(**module.inputs(texts))["score_B"]
        (scores * torch.arange(1.0, len(scores) + 1)).sum().backward()
        return scores.detach(), torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

    want, want_gradient = scores_and_gradient(batch(TEXTS, extra=extra))
    got, gradient = scores_and_gradient(batch(TEXTS, garbage, extra))
    assert torch.equal(got, want) and torch.equal(gradient, want_gradient), "bit for bit"
    alone = [float(module(**module.inputs(batch([text, text])))["score_B"][0]) for text in TEXTS]
    assert got.tolist() == pytest.approx(alone, abs=1e-5)


def test_a_blank_is_a_text_in_no_pair(module: RewardModelModule) -> None:
    blank = module.blank()
    assert len(blank) == 0 and module(**module.inputs(blank))["score_B"].shape == (1,)


def test_half_precision_pads_to_its_step(tiny_model: Path) -> None:
    half = RewardModelModule(load_reward_model(EngineSection(dtype="bf16"), str(tiny_model), 0, 3))  # type: ignore[arg-type]
    assert half.inputs(batch(TEXTS))["tokens"]["input_ids"].shape[1] == 16


Encode = Callable[[str], list[int]]


def test_plain_transformers_reads_the_same_scores(tiny_model: Path, tmp_path: Path) -> None:
    """`tokenizer(padding=True)` and the model, on a saved folder whose tokenizer came with pad = unk."""
    own = AutoTokenizer.from_pretrained(tiny_model, pad_token="<unk>")
    own.save_pretrained(tmp_path / "policy")
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "policy")
    made = load_tokenizer(str(tmp_path / "policy"))
    pad = separate_pad(made, (2,))
    module = RewardModelModule(load_reward_model(SECTION, str(tmp_path / "policy"), pad, 3))  # type: ignore[arg-type]
    module.model.save_pretrained(tmp_path / "reward")
    made.save_pretrained(tmp_path / "reward")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "reward")
    texts = ["w1 w2 w3 nothing</s>", "w9 </s>", "zzz w5 w6 w7 w8 w9 qqq"]
    with torch.no_grad():
        theirs = plain(**loaded(texts, padding=True, return_tensors="pt")).logits[:, 0]
        ours = module(**module.inputs(batch([made(text)["input_ids"] for text in texts])))["score_B"]
    assert torch.allclose(ours, theirs, atol=1e-5) and plain.config.pad_token_id == loaded.pad_token_id == pad
