"""The reward model's worker on a real engine: scores by row, budgets kept, exports that anybody loads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.reward_model import RewardModelConfig
from rlhf_dist.contracts.roles import UpdateRequest
from rlhf_dist.models.classifier import EncodedTexts, load_classifier
from rlhf_dist.models.flops import forward_flops
from rlhf_dist.models.reward_model import PAD
from rlhf_dist.rewards.scorer import RewardModel
from rlhf_dist.workers.reward_model import RewardModelWorker, build_reward_model

Build = Callable[..., RewardModelWorker]
PAIRS = [
    {"prompt": f"w{n} w3", "chosen": f" w{n + 1} w2" + " w4" * (n % 4), "rejected": " w9", "source": "ab"[n % 2], "margin": float(n)}
    for n in range(8)
]
RANKING = {"prompt": "w1 w2", "answers": [" w5 w6 w7 w8", " w1", " w2 w3 w4 w5 w6"], "ranks": [2, 1, 3]}


@pytest.fixture
def build(tmp_path: Path, tiny_model: Path, plain_rank: Any) -> Build:
    """`build(rows, model, **sections)`: a worker that has read a file of rows, a ranking in a file of its own."""

    def build(rows: list[dict[str, Any]] = PAIRS, model: Path = tiny_model, **sections: Any) -> RewardModelWorker:
        files = {"pairs": rows, "rankings": [RANKING], "held_out": PAIRS[:3]}
        for name, content in files.items():
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        train = [str(tmp_path / f"{name}.jsonl") for name in ("pairs", "rankings")]
        data = {"train": train, "eval": str(tmp_path / "held_out.jsonl"), "max_tokens": 32}
        values = {"data": data, "model": {"model": str(model), "optim": {"lr": 1e-2}} | sections.pop("model_section", {})} | sections
        return build_reward_model(RewardModelConfig.model_validate(values), plain_rank)

    return build


@pytest.fixture
def policy_with_pad_unk(tiny_model: Path, tmp_path: Path) -> Path:
    """A policy as published ones are: its tokenizer pads with a token that stands in texts, so a reward model needs another."""
    AutoTokenizer.from_pretrained(tiny_model, pad_token="<unk>").save_pretrained(tmp_path / "policy")
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def scored(folder: Path, texts: list[str]) -> list[float]:
    """As anybody would: the tokenizer's padding, the model's own pooling."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = AutoModelForSequenceClassification.from_pretrained(folder)(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    return [float(score) for score in logits[:, 0]]


def test_it_describes_rows_by_cost_and_weight(build: Build) -> None:
    facts = build([*PAIRS, PAIRS[0] | {"weight": 2.5}]).describe()
    assert facts.lengths == (*(2 * (6 + n % 4) for n in range(8)), 12, 3 * 9) and facts.weights == (*(1.0,) * 8, 2.5, 1.0)
    assert len(facts.eval_lengths) == 3 and facts.facts["trained_parameters"] == facts.facts["parameters"]


def test_judged_rows_are_the_scores_of_the_texts_alone(build: Build, tmp_path: Path) -> None:
    worker = build()
    judged = worker.judge("train", ((8, 0, 3), (), (1,)))
    worker.export(str(tmp_path / "export"))
    assert [(pair.source, pair.margin) for pair in judged if pair.margin is not None] == [("a", 0.0), ("b", 3.0), ("b", 1.0)]
    assert {pair.prompt for pair in judged if pair.margin is None} == {8} and len(judged) == 6
    by_margin = {pair.margin: pair for pair in judged if pair.margin is not None}
    for n in (0, 3, 1):
        texts = [PAIRS[n]["prompt"] + PAIRS[n][key] + " </s>" for key in ("chosen", "rejected")]
        alone = [scored(tmp_path / "export", [text])[0] for text in texts]
        assert [by_margin[n].better, by_margin[n].worse] == pytest.approx(alone, abs=1e-5)
        assert (by_margin[n].better_tokens, by_margin[n].worse_tokens) == (3 + n % 4, 2)
    ranked = [RANKING["prompt"] + RANKING["answers"][place] + " </s>" for place in (1, 0, 2)]
    best_first = scored(tmp_path / "export", ranked)
    got = [(pair.better, pair.worse) for pair in judged if pair.margin is None]
    assert got == [pytest.approx(pair, abs=1e-5) for pair in itertools.combinations(best_first, 2)]
    assert len(worker.judge("eval", ((0, 1, 2),))) == 3


def test_rows_with_other_numbers_of_answers_travel_apart(build: Build) -> None:
    worker = build()
    cut = worker._cut(worker._rows.train, ((0, 8, 1), (), (8,)))
    assert [[len(row.answers) for row in rows] for rows in cut] == [[2, 2], [3], [3]]
    one, other = worker.evaluate(((0, 1, 2),)).means(), worker.evaluate(((1,), (0, 2))).means()
    assert one == pytest.approx(other, rel=1e-5)


def test_packed_rows_are_as_long_as_their_tokens_and_judged_as_padded_ones(build: Build) -> None:
    """Rows with other numbers of answers share a microbatch: nothing is padded to the longest."""
    padded, packed = (build(model_section={"packing": packing, "microbatch_tokens": 64}) for packing in (False, True))
    assert packed.describe().lengths == (*(6 + n % 4 + 5 for n in range(8)), 8 + 5 + 9)
    assert len(packed._cut(packed._rows.train, ((0, 8, 1), ()))) == 1
    order = (0, 3, 1, 8)
    want, got = ([(pair.better, pair.worse) for pair in worker.judge("train", (order,))] for worker in (padded, packed))
    assert got == [pytest.approx(pair, abs=1e-5) for pair in want]
    norms = [worker.update(UpdateRequest((order,), 4.0)).step.grad_norm for worker in (padded, packed)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4) and norms[0] > 0


def test_costs_are_those_of_answers_apart(build: Build) -> None:
    facts = build().describe()
    one = forward_flops(build()._engine.module)
    answers = (8 * 2 + 3 + 3 * 2) / (8 + 1 + 3)
    assert facts.costs == one.together(answers) and one.head == 0


def test_it_learns(build: Build) -> None:
    worker = build()
    losses = [worker.update(UpdateRequest(((0, 1, 2, 3, 4, 5, 6, 7), (8,)), 9.0)).tally.means()["loss"] for _ in range(8)]
    assert losses[-1] < 0.3 * losses[0] and worker.evaluate(((0, 1, 2),)).means()["accuracy"] == 1.0


def first_loss(worker: RewardModelWorker, row: int) -> tuple[float, torch.Tensor]:
    """The loss of a row before the first step, and the scores of its answers, best first."""
    judged = worker.judge("train", ((row,),))
    scores = [judged[0].better, *(pair.worse for pair in judged[: 2 if row == 8 else 1])]
    loss = worker.update(UpdateRequest(((row,),), 1.0)).tally.means()["loss"]
    return loss, torch.tensor(scores, dtype=torch.float64)


def test_the_configured_ranking_is_what_is_learnt(build: Build) -> None:
    losses = {}
    for ranking in ("plackett_luce", "all_pairs"):
        losses[ranking], s = first_loss(build(reward_model={"ranking": ranking}), 8)
    closed = {
        "plackett_luce": s.logsumexp(0) - s[0] + s[1:].logsumexp(0) - s[1],
        "all_pairs": -logsigmoid(torch.stack([s[0] - s[1], s[0] - s[2], s[1] - s[2]])).mean(),
    }
    assert losses == pytest.approx({name: float(loss) for name, loss in closed.items()}, abs=1e-5)
    assert losses["plackett_luce"] > 2 * losses["all_pairs"], "near ln 6 and ln 2"


def test_the_configured_centring_and_margins_are_what_is_learnt(build: Build) -> None:
    plain, s = first_loss(build(), 3)
    assert plain == pytest.approx(float(-logsigmoid(s[0] - s[1])), abs=1e-5)
    for centring in (0.5, 30.0):
        loss, _ = first_loss(build(reward_model={"centring": centring}), 3)
        assert loss == pytest.approx(plain + centring * float(s.sum()) ** 2, rel=1e-4)
        assert loss > plain + 1e-4, "or the scores are too near 0 to tell"
    loss, _ = first_loss(build(reward_model={"margins": True}), 3)
    assert loss == pytest.approx(float(-logsigmoid(s[0] - s[1] - 3.0)), abs=1e-5)


def test_margins_that_no_row_has_are_refused(build: Build) -> None:
    bare = [{key: value for key, value in row.items() if key != "margin"} for row in PAIRS]
    soft = {"prompt": "w1", "response_a": " w2", "response_b": " w3"}
    assert build().describe().facts["rows with a margin"] == 7, "one of the eight margins is 0, the ranking has none"
    assert build(bare).describe().facts["rows with a margin"] == 0, "nothing is wrong as long as nobody asks"
    for rows in (bare, [row | {"margin": 0.0} for row in PAIRS], [soft | {"p": 0.8, "margin": 2.0}]):
        with pytest.raises(UserError, match="training rows is a pair with a hard label and a margin"):
            build(rows, reward_model={"margins": True})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_export_scores_as_the_engine_does(build: Build, policy_with_pad_unk: Path, tmp_path: Path, dtype: str) -> None:
    worker = build(model=policy_with_pad_unk, model_section={"dtype": dtype})
    worker.update(UpdateRequest(((0, 1, 2, 3),), 4.0))
    worker.export(str(tmp_path / "export"))
    judged = worker.judge("train", ((0, 1, 2, 3, 4, 5, 6, 7),))
    texts = [PAIRS[n]["prompt"] + PAIRS[n]["chosen"] + " </s>" for n in range(8)]
    ours = [pair.better for pair in sorted(judged, key=lambda pair: pair.margin or 0.0)]
    assert ours == pytest.approx(scored(tmp_path / "export", texts), abs=1e-5 if dtype == "fp32" else 2e-2)
    module = load_classifier(EngineSection(), str(tmp_path / "export"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.pad_token == PAD and module.model.config.pad_token_id == tokenizer.pad_token_id == 64
    encoded = EncodedTexts.from_rows([tokenizer(text)["input_ids"] for text in texts])
    if dtype == "fp32":
        assert module(**module.inputs(encoded))["score_B"].tolist() == pytest.approx(ours, abs=1e-5)


def test_adapters_train_with_the_head_and_merge_on_export(build: Build, tmp_path: Path) -> None:
    worker = build(model_section={"lora": {"r": 4}, "optim": {"lr": 1e-2}})
    facts = worker.describe().facts
    assert 32 < facts["trained_parameters"] < facts["parameters"] / 2
    before = worker.judge("train", ((0,),))[0].better
    for _ in range(3):
        worker.update(UpdateRequest(((0, 1, 2, 3),), 4.0))
    after = worker.judge("train", ((0,),))[0].better
    worker.export(str(tmp_path / "export"))
    assert abs(after - before) > 0.1
    assert scored(tmp_path / "export", [PAIRS[0]["prompt"] + PAIRS[0]["chosen"] + " </s>"])[0] == pytest.approx(after, abs=1e-5)


def test_training_goes_on_from_a_reward_model_with_its_head(build: Build, tmp_path: Path) -> None:
    first = build()
    first.update(UpdateRequest(((0, 1, 2, 3),), 4.0))
    first.export(str(tmp_path / "first"))
    again = build(model=tmp_path / "first", run={"seed": 9})
    assert again.judge("train", ((0, 1),)) == first.judge("train", ((0, 1),))


def test_who_scores_a_saved_model_sees_the_tokens_of_training(build: Build, tiny_model: Path, tmp_path: Path) -> None:
    """Chats too, where a stop token is named by generation_config.json alone: classifiers are saved without that file."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} w59 {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    policy = AutoModelForCausalLM.from_pretrained(tiny_model)
    policy.generation_config.eos_token_id = [2, tokenizer.convert_tokens_to_ids("w59")]
    for part in (policy, tokenizer):
        part.save_pretrained(tmp_path / "chat")
    prompt = [{"role": "user", "content": "w1 w2"}]
    worker = build([{"prompt": prompt, "chosen": "w3", "rejected": "w4 w5"}], tmp_path / "chat")
    (pair,) = worker.judge("train", ((0,),))
    worker.export(str(tmp_path / "export"))
    found = RewardModel.load(str(tmp_path / "export")).compare(prompt, "w3", "w4 w5")
    assert (found.score_a, found.score_b) == pytest.approx((pair.better, pair.worse), abs=1e-5)
