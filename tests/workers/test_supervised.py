"""The supervised worker on a real engine: row numbers in, exact sums out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_dist.algos.likelihood import nll_objective
from rlhf_dist.config.engines import PolicySection
from rlhf_dist.config.optim import OptimSection
from rlhf_dist.contracts.roles import UpdateRequest
from rlhf_dist.data.token_rows import TokenRow, collate_demonstrations
from rlhf_dist.engines.deepspeed import Training
from rlhf_dist.models.flops import forward_flops
from rlhf_dist.models.loading import load_causal_lm, load_tokenizer
from rlhf_dist.models.policy import PolicyModule
from rlhf_dist.workers.supervised import Rows, SupervisedWorker
from rlhf_dist.workers.training import build_engine


def row(*tokens: int, trained: int = 2, weight: float = 1.0) -> TokenRow:
    return TokenRow(np.array(tokens, dtype=np.int32), np.arange(len(tokens)) >= len(tokens) - trained, weight)


ROWS = Rows([row(1, 5, 6, 7), row(1, 8, 9, trained=1), row(1, 10, 11, 12, 2, trained=3)], [row(1, 6, 7), row(1, 9, 2)], {"dropped: x": 2})


@pytest.fixture
def worker(tiny_model: Path, plain_rank: Any) -> SupervisedWorker:
    section = PolicySection(model=str(tiny_model))
    engine = build_engine(PolicyModule(load_causal_lm(section, str(tiny_model))), section, plain_rank, Training(OptimSection(lr=1e-3), 10))
    return SupervisedWorker(engine, nll_objective, ROWS, collate_demonstrations, load_tokenizer(str(tiny_model)))


def reference_loss(model: Any, rows: list[TokenRow]) -> tuple[float, int]:
    """One row at a time, no padding."""
    total = 0.0
    for one in rows:
        tokens = torch.tensor(one.tokens.astype(np.int64))
        with torch.no_grad():
            logprobs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        picked = logprobs[torch.arange(len(tokens) - 1), tokens[1:]]
        total -= float(picked[torch.from_numpy(one.trained[1:])].sum())
    return total, sum(one.weight for one in rows)


def test_facts(worker: SupervisedWorker) -> None:
    facts = worker.describe()
    assert (facts.lengths, facts.weights, facts.eval_lengths, facts.fates) == ((4, 3, 5), (2.0, 1.0, 3.0), (3, 3), {"dropped: x": 2})
    assert facts.facts["parameters"] == facts.facts["trained_parameters"] > 1000
    assert facts.costs is not None and facts.costs.head == 2 * 32 * 64


def test_losses_are_those_of_unpadded_rows(worker: SupervisedWorker, tiny_model: Path) -> None:
    model = load_causal_lm(PolicySection(model=str(tiny_model)), str(tiny_model))
    total, weight = reference_loss(model, list(ROWS.evaluation))
    for cut in (((0, 1),), ((1,), (0,)), ((0,), (), (1,))):
        assert worker.evaluate(cut).means()["loss"] == pytest.approx(total / weight, rel=1e-5)
    total, weight = reference_loss(model, list(ROWS.train))
    info = worker.update(UpdateRequest(((2, 0), (1,), ()), float(weight)))
    assert info.tally.means()["loss"] == pytest.approx(total / weight, rel=1e-5) and info.step.grad_norm > 0
    costs = forward_flops(worker._engine.module)
    done = 3 * (costs.forward(4, 2) + costs.forward(3, 1) + costs.forward(5, 3)) / 1e12
    assert info.tally.means()["perf/update_tflops"] == pytest.approx(done / info.seconds)
    assert worker.evaluate(((0, 1),)).means()["loss"] != pytest.approx(reference_loss(model, list(ROWS.evaluation))[0] / 4, rel=1e-6)


def test_weight_2_is_the_row_twice(tiny_model: Path, plain_rank: Any) -> None:
    """In the gradient of a full batch, in its denominator, and in the metric, training and held-out."""
    one, other = row(1, 5, 6, 7), row(1, 8, 9, 10, trained=3)
    seen = []
    for train in ([one, other, other], [one, replace(other, token_weight=2.0)], [one, other]):
        section = PolicySection(model=str(tiny_model))
        module = PolicyModule(load_causal_lm(section, str(tiny_model)))
        engine = build_engine(module, section, plain_rank, Training(OptimSection(lr=1e-3, clip_norm=0.0), 10))
        worker = SupervisedWorker(engine, nll_objective, Rows(train, train), collate_demonstrations, None)
        total = sum(worker.describe().weights)
        batches = [collate_demonstrations([each]) for each in train]
        loss = engine.forward_backward(batches, nll_objective, total).means()["loss"]
        gradient = torch.cat([p.grad.flatten() for p in engine.module.parameters()])
        seen.append((total, loss, worker.evaluate((tuple(range(len(train))),)).means()["loss"], gradient))
    twice, weighted, once = seen
    assert twice[0] == weighted[0] == 8.0 and once[0] == 5.0
    assert weighted[1] == pytest.approx(twice[1], rel=1e-6) and weighted[2] == pytest.approx(twice[2], rel=1e-6)
    assert float((weighted[3] - twice[3]).norm() / twice[3].norm()) < 1e-6 < float((weighted[3] - once[3]).norm() / once[3].norm())
