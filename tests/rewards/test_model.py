"""Model rewards on a real tiny classifier: any microbatch budget, any choice of rows and any order give each row its own score."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import ExperienceBatch, StopReason
from rlhf_dist.models.classifier import ClassifierModule, EncodedTexts, load_classifier
from rlhf_dist.models.flops import forward_flops
from rlhf_dist.rewards.model import ModelReward
from rlhf_dist.rewards.text import RewardEncoder

STORIES = Path(__file__).resolve().parents[2] / ".." / "shared" / "models" / "stories260K"
ROWS = [([5, 6], [7, 2]), ([8], [9, 10, 11, 12, 13]), ([14, 15, 16], [2]), ([17], [18, 19, 2]), ([20, 21, 22, 23], [24, 25])]


class LocalEngine:
    """One process: runs the module and remembers what it was given."""

    def __init__(self, module: Any) -> None:
        self.module, self.calls = module, []

    def forward(self, microbatches: Sequence[EncodedTexts]) -> list[dict[str, torch.Tensor]]:
        self.calls.append(list(microbatches))
        with torch.no_grad():
            return [self.module(**self.module.inputs(microbatch)) for microbatch in microbatches]


class PlainEncoder:
    """Prompt and response ids as they are."""

    truncated = 0

    def encode(self, batch: ExperienceBatch) -> EncodedTexts:
        prompts = [t[m].tolist() for t, m in zip(batch.prompt_tokens_BP, batch.prompt_mask_BP, strict=True)]
        responses = [t[m].tolist() for t, m in zip(batch.response_tokens_BT, batch.response_attention_BT, strict=True)]
        return EncodedTexts.from_rows([p + r for p, r in zip(prompts, responses, strict=True)], self.truncated)


def experience(rows: Sequence[tuple[list[int], list[int]]]) -> ExperienceBatch:
    width_p, width_t, count = max(len(p) for p, _ in rows), max(len(r) for _, r in rows), len(rows)
    mask = torch.tensor([[True] * len(r) + [False] * (width_t - len(r)) for _, r in rows])
    zeros = torch.zeros(count, dtype=torch.long)
    return ExperienceBatch(
        prompt_tokens_BP=torch.tensor([[0] * (width_p - len(p)) + p for p, _ in rows]),
        prompt_mask_BP=torch.tensor([[False] * (width_p - len(p)) + [True] * len(p) for p, _ in rows]),
        response_tokens_BT=torch.tensor([r + [0] * (width_t - len(r)) for _, r in rows]),
        response_mask_BT=mask,
        response_attention_BT=mask,
        prompt_id_B=zeros,
        sample_index_B=zeros,
        policy_version_B=zeros,
        stop_reason_B=torch.full((count,), int(StopReason.LENGTH)),
        rollout_logprobs_BT=torch.zeros(count, width_t),
        prompts=("p",) * count,
        completions=("c",) * count,
    )


def classifier(seed: int = 0, vocabulary: int = 40) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=vocabulary, num_labels=1, initializer_range=0.5, **size)
    return LlamaForSequenceClassification(config).eval()


MODULE = ClassifierModule(classifier())


def alone(rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    with torch.no_grad():
        return [MODULE.model(input_ids=torch.tensor([p + r])).logits.item() for p, r in rows]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, len(ROWS) - 1), min_size=1, max_size=8), st.integers(1, 40))
def test_every_row_gets_its_own_score_whatever_the_cut(rows: list[int], budget: int) -> None:
    engine = LocalEngine(MODULE)
    result, _ = ModelReward("r", engine, PlainEncoder(), budget).score(experience(ROWS), rows)
    assert result.name == "r"
    assert result.values == pytest.approx(alone([ROWS[row] for row in rows]), abs=1e-5)
    for microbatch in engine.calls[0]:
        assert len(microbatch) == 1 or microbatch.tokens_BL.numel() <= budget


def test_the_engine_is_called_once_also_without_rows() -> None:
    engine = LocalEngine(MODULE)
    reward = ModelReward("r", engine, PlainEncoder(), 7)
    reward.score(experience(ROWS), [0, 1, 2, 3, 4])
    result, tally = reward.score(experience(ROWS), [])
    assert [len(call) for call in engine.calls] == [5, 0]
    assert result.values == () and tally.means() == {}


def test_a_row_without_text_abstains_and_takes_no_part_in_the_forward() -> None:
    class Silent(PlainEncoder):
        def encode(self, batch: ExperienceBatch) -> EncodedTexts:
            return EncodedTexts.from_rows([[], [5, 6, 7, 2], []])

    engine = LocalEngine(MODULE)
    result, _ = ModelReward("r", engine, Silent(), 100).score(experience(ROWS), [1, 0, 2])
    assert result.values[0] is None and result.values[2] is None
    assert result.values[1] == pytest.approx(alone(ROWS[:1])[0], abs=1e-5)
    assert [len(microbatch) for microbatch in engine.calls[0]] == [1]


def test_truncations_are_reported_as_a_share_of_rows() -> None:
    encoder = PlainEncoder()
    encoder.truncated = 2
    _, tally = ModelReward("quality", LocalEngine(MODULE), encoder, 100).score(experience(ROWS), [0, 1, 2, 3])
    assert tally.means()["rewards/quality_truncated"] == 0.5


def test_the_speed_is_that_of_the_texts_it_read() -> None:
    _, tally = ModelReward("r", LocalEngine(MODULE), PlainEncoder(), 9).score(experience(ROWS), [0, 2])
    costs = forward_flops(MODULE)
    assert tally.sums["perf/r_score_tflops"] == pytest.approx((costs.forward(4) + costs.forward(4)) / 1e12)
    assert tally.weights["perf/r_score_tflops"] > 0


def test_packed_texts_score_as_they_do_alone_and_the_budget_counts_no_padding() -> None:
    engine = LocalEngine(ClassifierModule(classifier(), packing=True))
    result, _ = ModelReward("r", engine, PlainEncoder(), 12).score(experience(ROWS), range(5))
    assert result.values == pytest.approx(alone(ROWS), abs=1e-5)
    assert [sum(microbatch.lengths) for microbatch in engine.calls[0]] == [12, 12]


def test_a_model_that_gives_nan_stops_the_run() -> None:
    broken = classifier(1)
    torch.nn.init.constant_(broken.score.weight, float("nan"))
    with pytest.raises(UserError, match="reward 'r' returned nan for row 0") as caught:
        ModelReward("r", LocalEngine(ClassifierModule(broken)), PlainEncoder(), 100).score(experience(ROWS), [0])
    assert caught.value.where == "model reward 'r'"


@pytest.mark.skipif(not STORIES.is_dir(), reason="shared/models/stories260K is not here")
def test_a_saved_reward_model_with_a_real_tokenizer_judges_what_the_policy_wrote(tmp_path: Path) -> None:
    classifier(2, vocabulary=512).save_pretrained(tmp_path)
    policy = AutoTokenizer.from_pretrained(STORIES)
    policy.save_pretrained(tmp_path)
    module = load_classifier(EngineSection(), str(tmp_path))
    encoder = RewardEncoder(AutoTokenizer.from_pretrained(tmp_path), policy, module.input_limit(None), "error")
    assert encoder.same_tokenizer
    rows = [
        (policy("Once upon a time")["input_ids"], policy(text, add_special_tokens=False)["input_ids"])
        for text in (", there was a cat.", " dogs.")
    ]
    result, _ = ModelReward("r", LocalEngine(module), encoder, 64).score(experience(rows), [0, 1])
    with torch.no_grad():
        expected = [module.model(input_ids=torch.tensor([p + r])).logits.item() for p, r in rows]
    assert result.values == pytest.approx(expected, abs=1e-5)
