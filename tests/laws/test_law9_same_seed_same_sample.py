"""Law 9: a completion is a function of seed, stream, step, prompt id, sample index and weights, not of the batch it is sampled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_dist.rollout.native import Completion, NativeEngine, RolloutRow, SamplingKey
from rlhf_dist.rollout.sampling import SamplingParams

KEY = SamplingKey(seed=7, stream="train", step=3)


@pytest.fixture(params=["tiny random model", "stories260K"])
def model(request: pytest.FixtureRequest, tiny_model: Path) -> Any:
    torch.set_num_threads(1)
    folder = tiny_model if request.param.startswith("tiny") else request.getfixturevalue("shared") / "models" / request.param
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def rows() -> list[RolloutRow]:
    """32 rows: eight prompts of 1 to 15 tokens, four samples each."""
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(3, 60, (1 + 2 * i,), generator=generator).tolist()) for i in range(8)]
    return [RolloutRow(prompts[i % 8], 1000 + i % 8, i // 8) for i in range(32)]


def assert_same(one: list[Completion], other: list[Completion]) -> None:
    """The same tokens exactly; log-probs to rounding (seen bit for bit on one CPU, but other CPUs have other kernels)."""
    assert [(c.tokens, c.stop_reason) for c in one] == [(c.tokens, c.stop_reason) for c in other]
    for a, b in zip(one, other, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


@pytest.mark.parametrize("params", [SamplingParams(40, stop_tokens=(2, 9)), SamplingParams(40, temperature=0.8, top_k=20, top_p=0.9)])
def test_batches_of_1_and_of_32(model: Any, rows: list[RolloutRow], params: SamplingParams) -> None:
    together, _ = NativeEngine(model, slots=32).generate(rows, params, KEY)
    alone = [NativeEngine(model, slots=1).generate([row], params, KEY)[0][0] for row in rows]
    assert_same(together, alone)


@pytest.mark.parametrize("slots", [1, 5, 8, 31])
def test_any_slots_and_any_order(model: Any, rows: list[RolloutRow], slots: int) -> None:
    params = SamplingParams(24, stop_tokens=(2, 9))
    expected, _ = NativeEngine(model, slots=32).generate(rows, params, KEY)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(slots)).tolist()
    shuffled, _ = NativeEngine(model, slots=slots).generate([rows[i] for i in order], params, KEY)
    assert_same(shuffled, [expected[i] for i in order])


def test_the_limit_does_not_change_what_comes_before_it(model: Any, rows: list[RolloutRow]) -> None:
    long, _ = NativeEngine(model, slots=8).generate(rows, SamplingParams(30), KEY)
    short, _ = NativeEngine(model, slots=8).generate(rows, SamplingParams(10), KEY)
    assert [c.tokens for c in short] == [c.tokens[:10] for c in long]
