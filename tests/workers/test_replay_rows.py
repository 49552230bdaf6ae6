"""Supervised stages: a step that is not finite is skipped and written down, and replayed to the losses that were recorded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_dist.config.stages import config_of
from rlhf_dist.contracts.roles import UpdateInfo, UpdateRequest
from rlhf_dist.engines.deepspeed import DeepSpeedEngine
from rlhf_dist.runs.capsule import TRAINED, Capsule, read_capsule
from rlhf_dist.workers.dpo import build_dpo
from rlhf_dist.workers.replay import TOLERANCE, replay
from rlhf_dist.workers.replay_rows import RowsSubject
from rlhf_dist.workers.reward_model import build_reward_model
from rlhf_dist.workers.sft import build_sft
from rlhf_dist.workers.supervised import Rows

BUILDS: dict[str, Callable[..., Any]] = {"sft": build_sft, "dpo": build_dpo, "reward": build_reward_model}
CUTS, WEIGHT = ((0, 3), (), (5, 1, 4), (2,)), 7.0
"""Row 5 of the reward model's is a ranking, which travels apart unless rows are packed."""
SPOILT: dict[str, tuple[dict[str, Any], str]] = {
    "sft": ({"token_weight": math.nan}, "weight is nan"),
    "dpo": ({"reference": (-9.0, -math.inf)}, "reference log-prob of rejected is -inf"),
    "reward": ({"margin": math.inf}, "margin is inf"),
}
"""What is wrong with row 3, and what is said of it."""

Make = Callable[..., Any]


def given(stage: str, folder: Path) -> Path:
    answers = [{"prompt": f"w{n} w9", "completion": f" w{n + 1}" * (1 + n % 3)} for n in range(6)]
    pairs = [{"prompt": f"w{n} w9", "chosen": f" w{n + 1}" * (1 + n % 3), "rejected": " w7", "margin": 0.5} for n in range(6)]
    rows: list[dict[str, Any]] = answers if stage == "sft" else pairs
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[: 5 if stage == "reward" else 6]))
    ranking = {"prompt": "w5 w9", "answers": [" w5", " w1 w2", " w3"], "ranks": [2, 1, 3]}
    (folder / "ranking.jsonl").write_text(json.dumps(ranking) + "\n")
    return path


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path, plain_rank: Any) -> Make:
    """`make(stage, **settings of the model)`: a worker after one good step, ready for the next."""

    def make(stage: str, **model: Any) -> Any:
        files = [str(given(stage, tmp_path)), *([str(tmp_path / "ranking.jsonl")] if stage == "reward" else [])]
        values = {"data": {"train": files, "max_tokens": 32}, "model": {"model": str(tiny_model), "optim": {"lr": 0.02}} | model}
        values |= {"reward_model": {"margins": True}} if stage == "reward" else {}
        worker = BUILDS[stage](config_of(stage).model_validate(values), plain_rank)
        if stage == "dpo":
            worker.keep_reference([said for _, said in worker.ask_reference("train", (tuple(range(6)),))], ())
        assert worker.update(UpdateRequest(CUTS, WEIGHT)).fault == ""
        return worker

    return make


def update(worker: Any, folder: Path, spoilt: dict[str, Any], left: int = 1) -> UpdateInfo:
    """A step in which row 3 is another."""
    rows = list(worker._rows.train)
    rows[3] = replace(rows[3], **spoilt)
    worker._rows = Rows(rows, worker._rows.evaluation)
    info: UpdateInfo = worker.update(UpdateRequest(CUTS, WEIGHT, str(folder), left))
    return info


def capsule_of(worker: Any, stage: str, folder: Path) -> Capsule:
    info = update(worker, folder, SPOILT[stage][0])
    assert (info.fault, info.capsule, info.step.skipped, info.unsound) == ("loss", str(folder), True, "")
    assert info.tally.sums.keys() == {"perf/update_tflops"}, "what a skipped step counted is no metric"
    return read_capsule(folder)


@pytest.mark.parametrize("stage", BUILDS)
@pytest.mark.parametrize("model", [{}, {"packing": True}, {"lora": {"r": 2}}, {"dtype": "bf16"}], ids=str)
def test_the_losses_are_those_that_were_recorded(stage: str, model: dict[str, Any], make: Make, tmp_path: Path) -> None:
    capsule = capsule_of(make(stage, **model), stage, tmp_path / "one")
    assert (capsule.facts.stage, capsule.facts.role, capsule.facts.denominator) == (stage, "model", WEIGHT)
    apart = ((0, 1), (2, 3), (4,), (5,)) if stage == "reward" and "packing" not in model else ((0, 1), (2, 3, 4), (5,))
    assert capsule.parts[0].microbatches == apart and [each.number for each in capsule.rows(0)][:2] == [0, 3]
    found = replay(capsule)
    assert found.reproduced and [math.isfinite(each.now) for each in found.microbatches] == [False] + [True] * (len(apart) - 1)
    for each in found.microbatches[1:]:
        assert abs(each.now - each.recorded) <= TOLERANCE[found.dtype] * each.size and each.size > 1e-2
        terms = [sample.loss for sample in found.samples if sample.microbatch == each.number]
        assert math.fsum(terms) == pytest.approx(each.now, rel=1e-5)
    (wrong,) = [sample for sample in found.samples if sample.fault]
    assert (wrong.name, wrong.fault) == ("row 3", SPOILT[stage][1]) and not math.isfinite(wrong.loss)
    assert wrong.texts["prompt"].split()[-2:] == ["w3", "w9"] and wrong.texts["from"].endswith("rows.jsonl:4")
    learnt = {"sft": ["completion"], "dpo": ["chosen", "rejected"], "reward": ["answer 1", "answer 2"]}[stage]
    assert list(wrong.texts) == ["from", "prompt", *learnt] and wrong.texts[learnt[0]].split() == ["w4", "</s>"]
    assert (tmp_path / "one" / TRAINED).exists() == ("lora" in model) != (tmp_path / "one" / "model").exists()


@pytest.mark.parametrize("stage", BUILDS)
def test_rows_and_weights_are_those_of_the_moment(stage: str, make: Make, tmp_path: Path) -> None:
    worker = make(stage)
    before = {name: weight.detach().clone() for name, weight in worker._engine.module.named_parameters()}
    capsule = capsule_of(worker, stage, tmp_path / "one")
    rows = list(worker._rows.train)
    for each in capsule.rows(0):
        assert repr(each.row) == repr(rows[each.number]) and each.row.origin == rows[each.number].origin is not None
    held = dict(RowsSubject(capsule).module.named_parameters())
    assert held.keys() == before.keys() and all(torch.equal(held[name], weight) for name, weight in before.items())


def test_an_infinite_gradient_of_a_finite_loss_is_replayed_to_the_very_loss(make: Make, tmp_path: Path, monkeypatch: Any) -> None:
    worker, step = make("sft", lora={"r": 2}), DeepSpeedEngine.optimizer_step

    def spoilt(self: Any) -> Any:
        next(p for p in self.module.parameters() if p.grad is not None).grad[0, 0] = math.inf
        return step(self)

    monkeypatch.setattr(DeepSpeedEngine, "optimizer_step", spoilt)
    assert update(worker, tmp_path / "one", {}).fault == "gradient"
    capsule = read_capsule(tmp_path / "one")
    found = replay(capsule)
    assert found.reproduced and found.loss == pytest.approx(capsule.loss, rel=1e-6) and not any(each.fault for each in found.samples)
    assert found.grad_norm is not None and math.isfinite(found.grad_norm) and found.gradient_fault == "", "here nobody makes it infinite"


def test_no_more_are_written_than_may_be_and_training_goes_on(make: Make, tmp_path: Path) -> None:
    worker = make("dpo")
    spoilt, good = SPOILT["dpo"][0], {"reference": (-9.0, -9.0)}
    assert update(worker, tmp_path / "none", spoilt, left=0).capsule == "" and not (tmp_path / "none").exists()
    assert update(worker, tmp_path / "one", spoilt).capsule and update(worker, tmp_path / "two", spoilt).capsule, "the loop counts"
    info = update(worker, tmp_path / "three", good)
    assert (info.fault, info.step.skipped) == ("", False) and "loss" in info.tally.sums and not (tmp_path / "three").exists()


def test_a_place_that_cannot_be_written_to_costs_the_capsule_and_not_the_run(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    worker = make("sft")
    info = update(worker, tmp_path / "file" / "one", SPOILT["sft"][0])
    assert info.fault == "loss" and info.capsule.startswith("not written on rank 0: ") and "Not a directory" in info.capsule
    assert update(worker, tmp_path / "one", {"token_weight": 1.0}).fault == ""


def test_what_the_model_answers_is_looked_at_where_the_rows_are_sound(make: Make, tmp_path: Path) -> None:
    subject = RowsSubject(capsule_of(make("dpo"), "dpo", tmp_path / "one"))
    rows = subject.rows(0)
    places = [2, 3]  # rows 5 and 1
    with torch.no_grad():
        outputs = subject.module(**subject.module.inputs(subject.batch(rows, places)))
    assert [look.fault for look in subject.looks(rows, places, outputs)] == ["", ""]
    outputs["logprobs_BT"][3, 1] = math.nan  # the second pair's rejected answer
    sound, wrong = subject.looks(rows, places, outputs)
    assert (sound.fault, wrong.fault) == ("", "the model's logprobs_BT is nan at response token 2 of rejected (id 2)")
    scorer = RowsSubject(capsule_of(make("reward"), "reward", tmp_path / "two"))
    rows = scorer.rows(0)
    scores = torch.zeros(5)
    scores[3] = -math.inf
    pair, ranking = scorer.looks(rows, [3, 4], {"score_B": scores})
    assert (pair.name, pair.fault, ranking.name, ranking.fault) == ("row 4", "", "row 5", "the model's score of answer 2 is -inf")
