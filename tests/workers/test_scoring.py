"""Scoring a shard: each rank its rows, any budget, and every number back in its row."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_dist.contracts.experience import merge_pieces
from rlhf_dist.models.flops import forward_flops
from rlhf_dist.workers.scoring import in_row_order, rows_of_rank, score_rows

SIZE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


class EchoEngine:
    """Answers with the tokens themselves, and remembers what it was given."""

    module = SimpleNamespace(model=LlamaForCausalLM(LlamaConfig(**SIZE)))

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size, self.calls, self.options = rank, world_size, [], {}

    def forward(self, microbatches: list[Any], **options: Any) -> list[dict[str, torch.Tensor]]:
        self.calls.append(list(microbatches))
        self.options = options
        return [
            {"tokens_BT": torch.where(m.response_mask_BT, m.response_tokens_BT, -99).float(), "last_B": m.prompt_tokens_BP[:, -1].float()}
            for m in microbatches
        ]


COSTS = forward_flops(EchoEngine.module)
FIELDS = {"tokens_BT": "values_BT", "last_B": "bootstrap_value_B"}
lengths = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=9)


@given(rows=st.integers(0, 40), world_size=st.integers(1, 9))
def test_ranks_share_the_rows_out(rows, world_size) -> None:
    shares = [rows_of_rank(rows, rank, world_size) for rank in range(world_size)]
    assert sorted(row for share in shares for row in share) == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@settings(deadline=None)
@given(lengths=lengths, world_size=st.integers(1, 4), budget=st.integers(1, 60), packed=st.booleans())
def test_every_number_comes_back_in_its_row_whatever_the_cut(shard_of, lengths, world_size, budget, packed) -> None:
    rows = [([100 * n + k for k in range(p)], [100 * n + 50 + k for k in range(r)]) for n, (p, r) in enumerate(lengths)]
    shard = shard_of(rows)
    engines = [EchoEngine(rank, world_size) for rank in range(world_size)]
    answers = [score_rows(engine, shard, FIELDS, budget, packed) for engine in engines]
    merged = merge_pieces(shard, [answer.payload for answer in answers])
    for n, (prompt, response) in enumerate(rows):
        assert merged.values_BT[n, : len(response)].tolist() == response and merged.bootstrap_value_B[n] == prompt[-1]
    held_by = [answer.info.rows for answer in answers]
    assert sorted(row for share in held_by for row in share) == list(range(len(rows)))
    loads = [sum(COSTS.in_tokens(sum(lengths[row])) for row in share) for share in held_by]
    assert max(loads) - min(loads) <= max(COSTS.in_tokens(p + r) for p, r in lengths) + 1e-9
    for engine, answer in zip(engines, answers, strict=True):
        assert answer.info.rows == answer.payload.rows and answer.info.seconds >= 0
        assert len(engine.calls) == 1  # also without rows: the call is collective
        for microbatch in engine.calls[0]:
            held = microbatch.prompt_lengths_B + microbatch.response_lengths_B
            assert len(microbatch) == 1 or (int(held.sum()) if packed else len(microbatch) * int(held.max())) <= budget


def test_options_reach_the_module(shard_of, ragged) -> None:
    engine = EchoEngine()
    score_rows(engine, shard_of(ragged), {"last_B": "bootstrap_value_B"}, 100, adapter=False)
    assert engine.options == {"adapter": False}


@pytest.mark.parametrize(("field", "name"), [("old_logprobs_BT", "policy"), ("ref_logprobs_BT", "reference"), ("values_BT", "value")])
def test_the_speed_is_what_was_needed_in_the_seconds_it_took(shard_of, ragged, field, name) -> None:
    answers = [score_rows(EchoEngine(rank, 2), shard_of(ragged), {"tokens_BT": field}, 10) for rank in range(2)]
    for answer in answers:
        done = sum(COSTS.forward(sum(map(len, ragged[row])), len(ragged[row][1])) for row in answer.info.rows)
        assert answer.info.tally.means() == {f"perf/{name}_score_tflops": pytest.approx(done / 1e12 / answer.info.seconds)}


def test_a_rank_without_rows_answers_with_an_empty_piece(shard_of) -> None:
    shard = shard_of([([1], [2, 3])])
    answer = score_rows(EchoEngine(1, 2), shard, FIELDS, 10)
    assert answer.info.tally.means() == {}, "no speed where nothing was done"
    assert answer.payload.rows == () and [t.numel() for t in answer.payload.tensors.values()] == [0, 0]
    merged = merge_pieces(shard, [score_rows(EchoEngine(0, 2), shard, FIELDS, 10).payload, answer.payload])
    assert merged.values_BT.tolist() == [[2.0, 3.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pieces_are_fp32_and_padded_with_zeros(dtype) -> None:
    outputs = [{"x_BT": torch.ones(1, 3, dtype=dtype)}, {"x_BT": torch.full((2, 1), 2.0, dtype=dtype)}]
    tensor = in_row_order(outputs, [[1], [2, 0]], "x_BT", 3)
    assert tensor.dtype == torch.float32 and tensor.tolist() == [[2, 0, 0], [1, 1, 1], [2, 0, 0]]
