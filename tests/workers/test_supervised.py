"""The supervised worker on a real engine: row numbers in, exact sums out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_dist.algos.likelihood import nll_objective
from rlhf_dist.config.engines import PolicySection
from rlhf_dist.config.optim import OptimSection
from rlhf_dist.contracts.roles import UpdateRequest
from rlhf_dist.data.token_rows import TokenRow, collate
from rlhf_dist.engines.deepspeed import Training
from rlhf_dist.models.loading import load_causal_lm, load_tokenizer
from rlhf_dist.models.policy import PolicyModule
from rlhf_dist.workers.supervised import Rows, SupervisedWorker
from rlhf_dist.workers.training import build_engine


def row(*tokens: int, trained: int = 2) -> TokenRow:
    return TokenRow(np.array(tokens, dtype=np.int32), np.arange(len(tokens)) >= len(tokens) - trained)


ROWS = Rows([row(1, 5, 6, 7), row(1, 8, 9, trained=1), row(1, 10, 11, 12, 2, trained=3)], [row(1, 6, 7), row(1, 9, 2)], {"dropped: x": 2})


@pytest.fixture
def worker(tiny_model: Path, plain_rank: Any) -> SupervisedWorker:
    section = PolicySection(model=str(tiny_model))
    engine = build_engine(PolicyModule(load_causal_lm(section, str(tiny_model))), section, plain_rank, Training(OptimSection(lr=1e-3), 10))
    return SupervisedWorker(engine, nll_objective, ROWS, collate, load_tokenizer(str(tiny_model)))


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


def test_losses_are_those_of_unpadded_rows(worker: SupervisedWorker, tiny_model: Path) -> None:
    model = load_causal_lm(PolicySection(model=str(tiny_model)), str(tiny_model))
    total, weight = reference_loss(model, list(ROWS.evaluation))
    for cut in (((0, 1),), ((1,), (0,)), ((0,), (), (1,))):
        assert worker.evaluate(cut).means()["loss"] == pytest.approx(total / weight, rel=1e-5)
    total, weight = reference_loss(model, list(ROWS.train))
    info = worker.update(UpdateRequest(((2, 0), (1,), ()), float(weight)))
    assert info.tally.means()["loss"] == pytest.approx(total / weight, rel=1e-5) and info.step.grad_norm > 0
    assert worker.evaluate(((0, 1),)).means()["loss"] != pytest.approx(reference_loss(model, list(ROWS.evaluation))[0] / 4, rel=1e-6)
