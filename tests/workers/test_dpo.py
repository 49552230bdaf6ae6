"""The DPO worker on a real engine: the reference is asked once, and the steps are those of a slow implementation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from rlhf_dist.config.dpo import DPOConfig
from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.roles import UpdateRequest
from rlhf_dist.data.pairs import PairRow
from rlhf_dist.models.flops import forward_flops
from rlhf_dist.models.loading import load_tokenizer
from rlhf_dist.runs.recorder import Recorder
from rlhf_dist.training.dpo import ask_reference
from rlhf_dist.training.supervised import Setting
from rlhf_dist.workers.dpo import DPOWorker, build_dpo, dpo_rows
from rlhf_dist.workers.spmd_group import SpmdGroup

Configured = Callable[..., DPOConfig]


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """Ragged pairs, some with a weight."""
    path = tmp_path / "pairs.jsonl"
    rows = [
        {
            "prompt": f"w{n} w{3 * n}",
            "chosen": f" w{n}" * (1 + n % 4),
            "rejected": f" w{n + 20}" * (1 + n % 3),
            "weight": (1, 2, 0.5)[n % 3],
        }
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def dpo_config(tiny_model: Path, pairs_file: Path) -> Configured:
    def make(dpo: dict[str, Any] | None = None, data: dict[str, Any] | None = None, reference: str = "", **model: Any) -> DPOConfig:
        return DPOConfig.model_validate(
            {
                "data": {"train": str(pairs_file), "max_tokens": 32} | (data or {}),
                "model": {"model": str(tiny_model), "optim": {"lr": 1e-3}} | model,
                "reference": {"model": reference},
                "dpo": dpo or {},
                "training": {"batch_size": 4},
            }
        )

    return make


@pytest.fixture
def other_model(tiny_model: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.lm_head.weight.add_(0.1 * torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(7)))
    folder = tmp_path / "other"
    model.save_pretrained(folder)
    load_tokenizer(str(tiny_model)).save_pretrained(folder)
    return folder


def ask(worker: DPOWorker, cuts: tuple[tuple[int, ...], ...]) -> list[tuple[float, float]]:
    return [said for _, said in sorted(worker.ask_reference("train", cuts))]


def prepared(config: DPOConfig, rank: Any) -> tuple[DPOWorker, list[tuple[float, float]]]:
    worker = build_dpo(config, rank)
    said = ask(worker, (tuple(range(len(worker.describe().lengths))),))
    worker.keep_reference(said, ())
    return worker, said


def answer_logprob(model: Any, tokens: np.ndarray, trained: np.ndarray) -> Tensor:
    """One sequence, no padding."""
    ids = torch.tensor(tokens.astype(np.int64))
    logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
    return logprobs[torch.arange(len(ids) - 1), ids[1:]][torch.from_numpy(trained[1:])].sum()


def slow_steps(model: Any, reference: Any, rows: list[PairRow], batches: list[list[int]], lr: float, beta: float) -> list[float]:
    """DPO as the paper writes it: a loop over pairs, and AdamW by hand (betas .9 and .95, eps 1e-5, gradient norm at most 1)."""
    parameters, losses = list(model.parameters()), []
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for step, batch in enumerate(batches, 1):
        total = torch.zeros(())
        for row in (rows[number] for number in batch):
            delta = []
            for side in (row.chosen, row.rejected):
                with torch.no_grad():
                    frozen = answer_logprob(reference, side.tokens, side.trained)
                delta.append(answer_logprob(model, side.tokens, side.trained) - frozen)
            total = total - row.weight * logsigmoid(beta * (delta[0] - delta[1]))
        loss = total / sum(rows[number].weight for number in batch)
        losses.append(float(loss.detach()))
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        scale = min(1.0, 1.0 / (norm + 1e-6))
        rate = lr * (1 - (step - 1) / len(batches))
        with torch.no_grad():
            for parameter, gradient, (first, second) in zip(parameters, gradients, moments, strict=True):
                first.mul_(0.9).add_(0.1 * scale * gradient)
                second.mul_(0.95).add_(0.05 * (scale * gradient).square())
                parameter -= rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-5)
    return losses


@pytest.mark.parametrize("options", [{}, {"packing": True}], ids=["padded", "packed"])
def test_three_steps_are_those_of_a_slow_implementation(dpo_config: Configured, plain_rank: Any, tiny_model: Path, options: Any) -> None:
    config = dpo_config({"beta": 0.3}, **options)
    worker, _ = prepared(config, plain_rank)
    batches = [[0, 5, 7, 9], [1, 2, 3, 4], [6, 8, 10, 11]]
    rows = list(worker._rows.train)
    model, reference = (AutoModelForCausalLM.from_pretrained(tiny_model).eval() for _ in range(2))
    expected = slow_steps(model, reference, rows, batches, 1e-3, 0.3)
    seen = []
    for batch in batches:
        weight = sum(rows[number].weight for number in batch)
        info = worker.update(UpdateRequest((tuple(batch[:1]), tuple(batch[1:]), ()), weight))
        seen.append(info.tally.means()["loss"])
    assert seen == pytest.approx(expected, rel=1e-5) and round(seen[0], 6) == 0.693147 != pytest.approx(seen[2], rel=1e-2)
    held = dict(worker._engine.module.model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(held[name].detach(), parameter.detach(), rtol=1e-4, atol=1e-5)


def test_the_reference_is_the_model_before_the_first_step(dpo_config: Configured, plain_rank: Any, tiny_model: Path) -> None:
    worker, said = prepared(dpo_config(), plain_rank)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    with torch.no_grad():
        for row, (chosen, rejected) in zip(worker._rows.train, said, strict=True):
            assert chosen == pytest.approx(float(answer_logprob(model, row.chosen.tokens, row.chosen.trained)), rel=1e-5)
            assert rejected == pytest.approx(float(answer_logprob(model, row.rejected.tokens, row.rejected.trained)), rel=1e-5)
    before = worker._rows.train[0].reference
    worker.update(UpdateRequest(((0, 1),), 2.0))
    assert worker._rows.train[0].reference == before, "it stays what it was"


def test_the_cut_does_not_matter(dpo_config: Configured, plain_rank: Any) -> None:
    worker = build_dpo(dpo_config(), plain_rank)
    whole = ask(worker, (tuple(range(12)),))
    parts = ask(worker, ((3, 1), (), (0, 2), tuple(range(4, 12))))
    np.testing.assert_allclose(parts, whole, rtol=1e-6)


def test_with_a_new_adapter_it_is_the_model_without_it(dpo_config: Configured, plain_rank: Any) -> None:
    _, plain = prepared(dpo_config(), plain_rank)
    worker, said = prepared(dpo_config(lora={"r": 4}), plain_rank)
    np.testing.assert_allclose(said, plain, rtol=1e-6)
    assert worker.update(UpdateRequest((tuple(range(12)),), 12.0)).tally.means()["loss"] == pytest.approx(math.log(2), abs=1e-6)
    facts = worker.describe().facts
    assert 0 < facts["trained_parameters"] < facts["parameters"]


@pytest.mark.parametrize("stage", [0, 3])
def test_another_model_as_reference_is_asked_and_let_go(
    dpo_config: Configured, plain_rank: Any, other_model: Path, zero: Callable[[int], str], stage: int
) -> None:
    worker = build_dpo(dpo_config(reference=str(other_model), deepspeed=zero(stage)), plain_rank)
    assert worker._reference is not None
    weights = list(worker._reference.module.parameters())
    said = ask(worker, (tuple(range(12)),))
    model = AutoModelForCausalLM.from_pretrained(other_model).eval()
    with torch.no_grad():
        row = worker._rows.train[4]
        assert said[4][0] == pytest.approx(float(answer_logprob(model, row.chosen.tokens, row.chosen.trained)), rel=1e-5)
    worker.keep_reference(said, ())
    assert worker._reference is None
    assert sum(held.numel() for weight in weights for held in (weight, getattr(weight, "ds_tensor", weight))) == 0, "memory is free again"
    means = worker.update(UpdateRequest(((0, 1, 2), (3,)), 4.0)).tally.means()
    assert means["loss"] != pytest.approx(math.log(2), abs=1e-3) and means["rewards/chosen"] != 0


def test_packed_rows_are_as_long_as_their_tokens(dpo_config: Configured, plain_rank: Any) -> None:
    padded, packed = (build_dpo(dpo_config(packing=packing), plain_rank) for packing in (False, True))
    assert padded.describe().lengths == tuple(len(row) for row in padded._rows.train)
    assert packed.describe().lengths == tuple(len(row.chosen.tokens) + len(row.rejected.tokens) for row in packed._rows.train)
    assert packed.describe().costs == padded.describe().costs == forward_flops(padded._engine.module).together(2)
    assert packed.describe().weights == padded.describe().weights == (1.0, 2.0, 0.5) * 4


def test_a_reference_that_is_not_finite_is_refused(dpo_config: Configured, plain_rank: Any) -> None:
    worker = build_dpo(dpo_config(), plain_rank)
    with torch.no_grad():
        worker._engine.module.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(UserError, match="not finite") as caught:
        worker.ask_reference("train", ((2, 3),))
    assert caught.value.where == "train rows [2, 3]"


def test_bytes_through_the_loop_do_not_grow_with_tokens(dpo_config: Configured, plain_rank: Any, tmp_path: Path) -> None:
    """Law 7: two numbers a row."""
    seen = {}
    for words in (1, 25):
        path = tmp_path / f"{words}.jsonl"
        rows = [{"prompt": f"w{n}", "chosen": f" w{n}" * words, "rejected": " w59" * words} for n in range(40)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        worker = build_dpo(dpo_config(data={"train": str(path)}), plain_rank)
        group = SpmdGroup("model", worker, plain_rank)
        ask_reference(Setting(group, worker.describe(), 8192, Recorder(None)))
        assert all(row.reference for row in worker._rows.train)
        seen[words] = group.bytes_received
    assert seen[25] == seen[1] < 40 * 60


def rows_of(tmp_path: Path, config: Configured, rows: list[dict[str, Any]], **options: Any) -> Any:
    path = tmp_path / "given.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options["data"] = {"train": str(path)} | options.get("data", {})
    made = config(**options)
    return dpo_rows(made, load_tokenizer(made.model.model))


def test_rankings_become_their_pairs(dpo_config: Configured, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, dpo_config, [{"prompt": "w1", "answers": [" w2", " w3", " w4"], "ranks": [2, 1, 3]}])
    texts = [(int(row.chosen.tokens[2]) - 4, int(row.rejected.tokens[2]) - 4) for row in rows.train]
    assert texts == [(3, 2), (3, 4), (2, 4)] and {row.origin.where for row in rows.train} == {f"{tmp_path / 'given.jsonl'}:1"}
    assert all(row.chosen.tokens[-1] == 2 and row.chosen.trained[-1] for row in rows.train), "answers end with the stop token"


def test_labels_by_loss(dpo_config: Configured, tmp_path: Path) -> None:
    """A tie, a label that is 0.8 sure, one that is 0.3 sure; split over both sides."""
    given = [{"prompt": f"w{n}", "response_a": " w2", "response_b": " w3", "p": p} for n in range(20) for p in (0.5, 0.8, 0.3)]
    soft = rows_of(tmp_path, dpo_config, given, data={"eval_fraction": 0.3})
    assert len(soft.train) + len(soft.evaluation) == 60 and soft.fates == {}
    assert sorted({row.label_probability for row in soft.train}) == [0.5, 0.7, 0.8]
    hard = rows_of(tmp_path, dpo_config, given, data={"eval_fraction": 0.3}, dpo={"loss": "hinge"})
    assert len(hard.train) + len(hard.evaluation) == 40 and {row.label_probability for row in hard.train} == {None}
    held_out = len(soft.evaluation) // 3
    names = ("dropped: a tie, of which this loss learns nothing", "label taken as certain: this loss reads no probabilities")
    assert hard.fates == {names[0]: 20, names[1]: 40} and hard.eval_fates == {names[0]: held_out, names[1]: 2 * held_out}
