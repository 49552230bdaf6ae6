"""A saved reward model: the tokens of training, the scores of transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaForSequenceClassification

from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.scoring import ScoringConfig, ScoringModelSection, ScoringRowsSection
from rlhf_dist.models.loading import load_token_scorer
from rlhf_dist.rewards.scorer import Comparison, RewardModel, preference

PROMPTS, ANSWERS = ["w1 w2 ", "w3 ", "w4 w5 w6 w7 "], ["w8 w9", "w10 w11 w12 w13", "w14"]
CHAT = [{"role": "user", "content": "w1 w2"}]


@pytest.fixture(scope="module")
def scorer(tiny_scorer: Path) -> RewardModel:
    return RewardModel.load(str(tiny_scorer))


@pytest.fixture(scope="module")
def by_hand(tiny_scorer: Path) -> Any:
    """`by_hand(ids)`: what transformers says of token ids, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_scorer)

    def score(ids: list[int]) -> float:
        with torch.no_grad():
            return float(model(input_ids=torch.tensor([ids])).logits[0, 0])

    return score


def test_texts_are_tokenised_together_and_end_with_the_stop_token(scorer: RewardModel, by_hand: Any, tiny_scorer: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_scorer)
    expected = [by_hand([*tokenizer(p + a)["input_ids"], tokenizer.eos_token_id]) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert scorer.score(PROMPTS, ANSWERS) == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 4) for value in expected}) == 3  # the fixture tells texts apart


def test_packed_texts_score_as_padded_ones(scorer: RewardModel, tiny_scorer: Path) -> None:
    packed = RewardModel.from_config(str(tiny_scorer), ScoringConfig(model=ScoringModelSection(packing=True, microbatch_tokens=16)))
    assert packed.score(PROMPTS, ANSWERS) == pytest.approx(scorer.score(PROMPTS, ANSWERS), abs=1e-5)


@pytest.fixture(params=["pad is eos", "pad is unk", "a pad of its own"])
def policy(request: Any, pad_is_eos: Any, tiny_model: Path, tmp_path: Path) -> Path:
    """What a reward model starts from."""
    if request.param == "pad is eos":
        return pad_is_eos()  # type: ignore[no-any-return]
    if request.param == "a pad of its own":
        return tiny_model
    AutoTokenizer.from_pretrained(tiny_model, pad_token="<unk>").save_pretrained(tmp_path / "unk")
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "unk")
    return tmp_path / "unk"


def test_an_adapter_scores_as_the_merged_model(policy: Path, train_judge: Any) -> None:
    """In texts with their eos and in padded batches; as a value model too. And it can be trained on."""
    export = train_judge(policy, lora={"r": 2}) / "export"
    merged, adapter = RewardModel.load(str(export)), RewardModel.load(str(export / "adapter"))
    want = merged.score(PROMPTS, ANSWERS)
    assert adapter.score(PROMPTS, ANSWERS) == pytest.approx(want, abs=1e-5)
    assert [adapter.score([p], [a])[0] for p, a in zip(PROMPTS, ANSWERS, strict=True)] == pytest.approx(want, abs=1e-5)
    value: Any = load_token_scorer(EngineSection(), str(export / "adapter"), zero_head=False)
    whole: Any = AutoModelForSequenceClassification.from_pretrained(export)
    assert all(torch.equal(weight, whole.get_parameter(name)) for name, weight in value.named_parameters())
    pads, stops = ([getattr(config, key) for config in (value.config, whole.config)] for key in ("pad_token_id", "eos_token_id"))
    assert pads[0] == pads[1] == AutoTokenizer.from_pretrained(export / "adapter").pad_token_id and stops[0] == stops[1]
    further = train_judge(export / "adapter", "again", lora={"r": 2}, optim={"lr": 1e-12}) / "export"
    for folder in (further, further / "adapter"):
        assert RewardModel.load(str(folder)).score(PROMPTS, ANSWERS) == pytest.approx(want, abs=1e-5)


def test_an_adapter_on_a_language_models_adapted_embeddings(pad_is_eos: Any, train_judge: Any, tmp_path: Path) -> None:
    """The pad's row was added after the first adapter was trained."""
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pad_is_eos()), LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    )
    adapted.save_pretrained(str(tmp_path / "first"))
    for name, targets in (("other", ["q_proj"]), ("same", ["embed_tokens"])):
        export = train_judge(tmp_path / "first", name, lora={"r": 3, "target_modules": targets}) / "export"
        want = RewardModel.load(str(export)).score(PROMPTS, ANSWERS)
        assert RewardModel.load(str(export / "adapter")).score(PROMPTS, ANSWERS) == pytest.approx(want, abs=1e-5)


def test_peft_scores_as_the_merged_model_once_it_is_told_the_pad(pad_is_eos: Any, train_judge: Any) -> None:
    """It gives the embeddings their row because of the tokenizer, and leaves the pad of the base in the configuration."""
    export = train_judge(pad_is_eos(), lora={"r": 2}) / "export"
    tokenizer = AutoTokenizer.from_pretrained(export / "adapter")
    model = AutoPeftModelForSequenceClassification.from_pretrained(str(export / "adapter"), num_labels=1).eval()
    assert model.config.pad_token_id != tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    texts = tokenizer(["w1 w2 w3 </s>", "w4 </s>"], padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs, ours = (each(**texts).logits for each in (model, AutoModelForSequenceClassification.from_pretrained(export)))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_a_stop_token_that_is_there_is_not_doubled(scorer: RewardModel) -> None:
    assert scorer.score(["w1 "], ["w2 </s>"]) == pytest.approx(scorer.score(["w1 "], ["w2"]))


def test_chats_go_through_the_template(scorer: RewardModel, by_hand: Any, tiny_scorer: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_scorer)
    text = tokenizer.apply_chat_template([*CHAT, {"role": "assistant", "content": "w3"}], tokenize=False)
    assert scorer.score([CHAT], ["w3"]) == pytest.approx([by_hand(tokenizer(text, add_special_tokens=False)["input_ids"])], abs=1e-5)
    assert scorer.score([CHAT], ["w3"]) != pytest.approx(scorer.score(["w1 w2"], ["w3"]))


def test_batches_change_nothing(tiny_scorer: Path, scorer: RewardModel) -> None:
    alone = RewardModel.from_config(str(tiny_scorer), ScoringConfig(model=ScoringModelSection(device="cpu", microbatch_tokens=1)))
    assert alone.score(PROMPTS * 3, ANSWERS * 3) == pytest.approx(scorer.score(PROMPTS * 3, ANSWERS * 3), abs=1e-5)
    assert scorer.score([], []) == []


def test_a_comparison_is_the_sigmoid_of_the_difference(scorer: RewardModel) -> None:
    found = scorer.compare("w1 ", "w2 w3", "w4")
    a, b = scorer.score(["w1 ", "w1 "], ["w2 w3", "w4"])
    assert (found.score_a, found.score_b) == pytest.approx((a, b), abs=1e-5)
    assert found.probability_a == pytest.approx(1 / (1 + math.exp(b - a)), abs=1e-5)
    other = scorer.compare("w1 ", "w4", "w2 w3")
    assert other.probability_a == pytest.approx(1 - found.probability_a, abs=1e-5)
    assert Comparison.of(2.0, 2.0).probability_a == 0.5


def test_preferences_of_any_size_are_finite() -> None:
    assert (preference(1e5, -1e5), preference(-1e5, 1e5), preference(1.0, 1.0)) == (1.0, 0.0, 0.5)


def test_a_long_text_is_refused_or_loses_the_front_of_its_prompt(tiny_scorer: Path, scorer: RewardModel) -> None:
    long = " ".join(f"w{n % 60}" for n in range(50)) + " "
    with pytest.raises(UserError, match=r"52 tokens, the limit is 32|limit is 32"):
        scorer.score([long], ["w1"])
    cutting = RewardModel.load(str(tiny_scorer), max_tokens=12, overlong="truncate")
    ending = " ".join(f"w{n % 60}" for n in range(41, 50)) + " "  # <s>, nine words, the answer, the stop token
    assert cutting.score([long], ["w1"]) == pytest.approx(cutting.score([ending], ["w1"]), abs=1e-6)
    with pytest.raises(UserError, match="no room for its prompt"):
        cutting.score(["w1 "], [long])
    # Both answers see the same prompt: the longer one says where it is cut.
    both = cutting.compare(long, "w1", "w1 w2 w3")
    ending = " ".join(f"w{n % 60}" for n in range(43, 50)) + " "
    assert both.score_a == pytest.approx(cutting.score([ending], ["w1"])[0], abs=1e-6)
    with pytest.raises(UserError, match="context is 32"):
        RewardModel.load(str(tiny_scorer), max_tokens=64)


def test_scores_that_are_not_numbers_stop(tiny_scorer: Path, tmp_path: Path) -> None:
    model = LlamaForSequenceClassification.from_pretrained(tiny_scorer)
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = math.nan  # w5
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_scorer).save_pretrained(tmp_path)
    broken = RewardModel.load(str(tmp_path))
    with pytest.raises(UserError, match="1 of 2 scores are not finite"):
        broken.score(["w1 ", "w5 "], ["w2", "w2"])


def test_several_outputs_need_a_label(tiny_scorer: Path, tmp_path: Path) -> None:
    config = LlamaForSequenceClassification.from_pretrained(tiny_scorer).config
    config.num_labels = 3
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_scorer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="3 outputs"):
        RewardModel.load(str(tmp_path))
    section = ScoringModelSection(device="cpu", label=1, transform="probability")
    (score,) = RewardModel.from_config(str(tmp_path), ScoringConfig(model=section)).score(["w1 "], ["w2"])
    assert 0 < score < 1


def test_dropped_texts_have_no_place_in_a_list(tiny_scorer: Path) -> None:
    config = ScoringConfig(model=ScoringModelSection(device="cpu"), data=ScoringRowsSection(max_tokens=4, overlong="drop"))
    with pytest.raises(UserError, match="no score"):
        RewardModel.from_config(str(tiny_scorer), config).score(["w1 w2 w3 w4 "], ["w5"])


def test_faults_in_what_is_asked(scorer: RewardModel, tiny_model: Path, tiny_scorer: Path) -> None:
    with pytest.raises(ValueError, match="2 prompts for 1 completions"):
        scorer.score(["w1", "w2"], ["w3"])
    with pytest.raises(UserError, match=r"not hold|not in the folder|would be random"):
        RewardModel.load(str(tiny_model))  # a language model has no trained head
    with pytest.raises(UserError, match="no device"):
        RewardModel.load(str(tiny_scorer), device="quantum")
    with pytest.raises(UserError, match="not there"):
        RewardModel.load(str(tiny_scorer), device="cuda:99")
