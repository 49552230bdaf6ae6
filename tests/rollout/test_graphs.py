"""Steps in buckets: which bucket, when they are recorded, and the same tokens from what was recorded as from the plain path.

Without a GPU a step is recorded by tracing: as in a CUDA graph, what is left is operations on tensors at fixed places, and every number
that Python put in is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from rlhf_dist.rollout import native
from rlhf_dist.rollout.decoder import SlotDecoder
from rlhf_dist.rollout.graphs import Bucket, Grid, Step, StepGraphs, graphs_for
from rlhf_dist.rollout.native import Completion, NativeEngine, RolloutRow, SamplingKey
from rlhf_dist.rollout.probe import decoding_gap, graphs_hold
from rlhf_dist.rollout.sampling import SamplingParams
from rlhf_dist.rollout.traits import decoding, read_traits

KEY = SamplingKey(0, "train", 0)
BASE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "llama": hf.LlamaConfig(**BASE),
    "qwen2_sliding": hf.Qwen2Config(**BASE, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "gemma2": hf.Gemma2Config(**BASE, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "gpt2": hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2),
}
SIZES = st.integers(1, 300)


def traced(step: Step) -> Step:
    """What stands in for a CUDA graph: the step's tensor operations, and nothing of its Python."""
    return make_fx(step)()


@settings(deadline=None)
@given(rows=SIZES, span=SIZES, most_rows=SIZES, most_span=SIZES)
def test_a_bucket_holds_its_step_and_there_are_few(rows: int, span: int, most_rows: int, most_span: int) -> None:
    rows, span = min(rows, most_rows), min(span, most_span)
    grid = Grid(Bucket(4, 64), Bucket(most_rows, most_span))
    bucket = grid.bucket(rows, span)
    assert rows <= bucket.rows <= max(min(4, most_rows), 2 * rows) and bucket.rows <= most_rows
    assert span <= bucket.span <= max(min(64, most_span), 2 * span) and bucket.span <= most_span
    assert grid.bucket(bucket.rows, bucket.span) == bucket
    assert len({grid.bucket(n, 1) for n in range(1, most_rows + 1)}) <= 1 + max(0, (most_rows - 1).bit_length() - 2)


def test_the_first_step_of_a_bucket_runs_the_second_is_recorded_all_later_ones_are_replayed() -> None:
    log: list[str] = []

    def step(name: str) -> Step:
        return lambda: log.append(name) or torch.zeros(1)  # type: ignore[func-returns-value]

    def capture(step: Step) -> Step:
        log.append("record")
        return step

    graphs = StepGraphs(capture)
    for bucket, name in ((4, "a"), (4, "b"), (8, "c"), (4, "d"), (8, "e")):
        graphs.run(Bucket(bucket, 64), step(name))
    assert log == ["a", "record", "b", "c", "b", "record", "e"]


def complete(engine: NativeEngine, rows: Sequence[RolloutRow], params: SamplingParams) -> list[Completion]:
    return engine.generate(rows, params, KEY)[0]


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Engines record and replay, as they do on a GPU, and every forward is the model's own; the list fills with what they record."""
    recorded: list[Step] = []

    def capture(step: Step) -> Step:
        recorded.append(step)
        return traced(step)

    monkeypatch.setattr(native, "graphs_for", lambda device: StepGraphs(capture))
    monkeypatch.setattr("rlhf_dist.rollout.forward.fusable", lambda model: False)
    monkeypatch.setattr("rlhf_dist.rollout.prepack.prepack_available", lambda: False)
    return recorded


@pytest.mark.parametrize("name", CONFIGS)
def test_replayed_steps_give_the_tokens_of_the_plain_path(
    build: Callable[..., Any], rows: list[RolloutRow], forward_gap: Callable[..., float], recording: list[Step], name: str
) -> None:
    model = build(CONFIGS[name])
    limits = (3, 50, 9, 20, 4, 50, 1, 30, 12)
    ragged = [RolloutRow(r.prompt_tokens, r.prompt_id, r.sample_index, limit) for r, limit in zip(rows, limits, strict=True)]
    engine = NativeEngine(model, slots=6)
    complete(engine, ragged[:1], SamplingParams(1))  # the look at the first call
    recording.clear()
    out = complete(engine, ragged, SamplingParams(50))
    # 8 and 4 rows, 64 positions and the 80 that are the most: rows in use only fall and spans only rise, but for a refill.
    assert 2 <= len(recording) <= 4
    assert [len(c.tokens) for c in out] == list(limits)
    assert forward_gap(model, ragged, out) < 1e-5
    assert [c.tokens for c in out] == [c.tokens for c in complete(NativeEngine(model, slots=1), ragged, SamplingParams(50))]


@pytest.mark.parametrize("in_place", [True, False])
def test_every_call_replays_the_weights_of_its_time(
    build: Callable[..., Any], llama: Any, rows: list[RolloutRow], forward_gap: Any, recording: list[Step], in_place: bool
) -> None:
    model = build(llama.config)
    engine = NativeEngine(model, slots=4)
    before = complete(engine, rows, SamplingParams(12))
    with torch.no_grad():
        for parameter in model.parameters():
            changed = parameter * 1.1
            if in_place:
                parameter.copy_(changed)
            else:
                parameter.data = changed
    recording.clear()
    after = complete(engine, rows, SamplingParams(12))
    assert recording and after != before and forward_gap(model, rows, after) < 1e-5


def test_rows_that_fill_up_a_bucket_change_nothing(llama: Any) -> None:
    prompts = [(5, 6, 7), (8, 9), (3,), (4, 4, 4, 4), (9, 8, 7)]
    with decoding(llama):
        in_buckets = SlotDecoder(llama, read_traits(llama), 16, 64, graphs=StepGraphs(traced))
        plain = SlotDecoder(llama, read_traits(llama), 16, 64)
        for round_ in range(4):
            for decoder in (in_buckets, plain):
                decoder.admit(prompts[: 5 - round_], [0] * (5 - round_))
            for token in (11, 12, 13):
                mine, theirs = in_buckets.step(), plain.step()
                assert mine.shape == theirs.shape and torch.allclose(mine, theirs, atol=1e-5)
                for decoder in (in_buckets, plain):
                    decoder.feed(torch.full((decoder.count,), token))
            for decoder in (in_buckets, plain):
                for row in range(decoder.count - 1, 0, -2):
                    decoder.drop(row)


def test_the_probe_accepts_what_replays_rightly_and_warns_of_the_rest(llama: Any) -> None:
    traits = read_traits(llama)

    def refuse(step: Step) -> Step:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def frozen(step: Step) -> Step:
        logits = step()
        return lambda: logits

    with decoding(llama):
        assert graphs_hold(llama, traits, StepGraphs(traced))
        assert not graphs_hold(llama, traits, None)
        for capture, why in ((refuse, "not permitted when stream is capturing"), (frozen, "replayed steps differ")):
            with pytest.warns(UserWarning, match=why):
                assert not graphs_hold(llama, traits, StepGraphs(capture))


def test_there_are_no_graphs_on_a_cpu() -> None:
    assert graphs_for(torch.device("cpu")) is None


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_cuda_graphs_agree_with_the_models_forward(build: Callable[..., Any], name: str, dtype: torch.dtype) -> None:
    model = build(CONFIGS[name]).to("cuda", dtype)
    traits, graphs = read_traits(model), graphs_for(torch.device("cuda"))
    assert graphs is not None
    with decoding(model):
        assert decoding_gap(model, traits, graphs=graphs) < (1e-4 if dtype == torch.float32 else 0.25)
    assert len(graphs._replays) == 1


@pytest.mark.gpu
@gpu
def test_an_engine_on_a_gpu_replays_and_takes_weights_as_they_are(
    build: Callable[..., Any], llama: Any, rows: list[RolloutRow], forward_gap: Any
) -> None:
    model = build(llama.config).to("cuda")
    engine = NativeEngine(model, slots=4)
    before = complete(engine, rows, SamplingParams(24))
    assert engine._replays is True
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter * 1.1
    after = complete(engine, rows, SamplingParams(24))
    assert before != after and forward_gap(model.cpu(), rows, after) < 1e-4
