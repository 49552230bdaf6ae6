"""The engine as a whole: law 9, stops, limits, weights as they are now, faults, the tally."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import StopReason
from rlhf_dist.rollout import native
from rlhf_dist.rollout.native import Completion, NativeEngine, RolloutRow, SamplingKey
from rlhf_dist.rollout.sampling import SamplingParams

KEY = SamplingKey(seed=0, stream="train", step=0)
Rows = Sequence[RolloutRow]


def complete(model: Any, rows: Rows, params: SamplingParams, slots: int = 4, key: SamplingKey = KEY, **kwargs: Any) -> list[Completion]:
    return NativeEngine(model, slots=slots, **kwargs).generate(rows, params, key)[0]


def test_completions_are_in_input_order_and_end_at_the_limit(llama: Any, rows: Rows) -> None:
    out = complete(llama, rows, SamplingParams(20))
    assert [(len(c.tokens), len(c.logprobs), c.stop_reason) for c in out] == [(20, 20, StopReason.LENGTH)] * len(rows)
    alone = [complete(llama, [row], SamplingParams(20))[0].tokens for row in rows]
    assert [c.tokens for c in out] == alone


def test_a_row_may_have_a_shorter_limit_of_its_own(llama: Any, rows: Rows) -> None:
    limits = [1, 20, 7, 50, 3, 20, 2, 11, 5]
    limited = [RolloutRow(r.prompt_tokens, r.prompt_id, r.sample_index, limit) for r, limit in zip(rows, limits, strict=True)]
    full, short = complete(llama, rows, SamplingParams(20)), complete(llama, limited, SamplingParams(20))
    assert [c.tokens for c in short] == [c.tokens[:limit] for c, limit in zip(full, limits, strict=True)]


def test_a_stop_token_is_kept_and_ends_the_row(llama: Any, rows: Rows) -> None:
    full = complete(llama, rows, SamplingParams(30))
    stops = tuple({full[0].tokens[4], full[3].tokens[9]})
    for long, cut in zip(full, complete(llama, rows, SamplingParams(30, stop_tokens=stops)), strict=True):
        end = next((i + 1 for i, token in enumerate(long.tokens) if token in stops), None)
        assert cut.tokens == long.tokens[:end] and cut.logprobs == long.logprobs[:end]
        assert cut.stop_reason is (StopReason.STOP_TOKEN if end else StopReason.LENGTH)


def test_a_stop_string_ends_the_row(llama: Any, rows: Rows) -> None:
    def decode(tokens: Sequence[int]) -> str:
        return "".join(f"<{token}>" for token in tokens)

    full = complete(llama, rows, SamplingParams(20))
    wanted = decode(full[1].tokens[5:7])[1:]
    cut = complete(llama, rows, SamplingParams(20, stop_strings=(wanted,)), decode=decode)
    assert cut[1].tokens == full[1].tokens[:7] and cut[1].stop_reason is StopReason.STOP_STRING
    for long, short in zip(full, cut, strict=True):
        assert (wanted in decode(long.tokens)) == (short.stop_reason is StopReason.STOP_STRING)


def test_seed_stream_step_prompt_and_sample_all_change_the_completion(llama: Any) -> None:
    row = RolloutRow((5, 6, 7), 1, 0)
    keys = [KEY, SamplingKey(1, "train", 0), SamplingKey(0, "eval", 0), SamplingKey(0, "train", 1)]
    seen = {complete(llama, [row], SamplingParams(20), key=key)[0].tokens for key in keys}
    others = [RolloutRow(row.prompt_tokens, 2, 0), RolloutRow(row.prompt_tokens, 1, 1)]
    seen |= {completion.tokens for completion in complete(llama, others, SamplingParams(20))}
    assert len(seen) == 6
    assert complete(llama, [row], SamplingParams(20)) == complete(llama, [row], SamplingParams(20))


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_logprobs_are_at_the_temperature(llama: Any, rows: Rows, forward_gap: Callable[..., float], temperature: float) -> None:
    out = complete(llama, rows, SamplingParams(12, temperature=temperature))
    assert forward_gap(llama, rows, out, temperature) < 1e-5


def test_tokens_follow_the_models_distribution(llama: Any) -> None:
    count = 4000
    out = complete(llama, [RolloutRow((5, 6, 7), 1, i) for i in range(count)], SamplingParams(1), slots=512)
    with torch.no_grad():
        probs = llama(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in out]), minlength=97)
    assert bool(((counts - count * probs).abs() < 5 * (count * probs * (1 - probs)).sqrt() + 1).all())


def test_top_k_one_is_greedy_and_the_kept_mass_is_tallied_only_with_filters(llama: Any, rows: Rows) -> None:
    engine = NativeEngine(llama, slots=4)
    out, tally = engine.generate(rows[:2], SamplingParams(5, top_k=1), KEY)
    with torch.no_grad():
        best = [llama(torch.tensor([r.prompt_tokens])).logits[0, -1].log_softmax(-1).max(-1) for r in rows[:2]]
    assert [c.tokens[0] for c in out] == [int(b.indices) for b in best]
    assert [c.logprobs[0] for c in out] == pytest.approx([float(b.values) for b in best], abs=1e-5)
    mean_mass = sum(torch.tensor(c.logprobs).exp().sum().item() for c in out) / 10
    assert tally.means()["rollout/kept_mass"] == pytest.approx(mean_mass, rel=1e-5)
    assert "rollout/kept_mass" not in engine.generate(rows[:2], SamplingParams(5), KEY)[1].means()


def test_finished_rows_leave_and_waiting_ones_take_their_slots(llama: Any) -> None:
    rows = [RolloutRow((5, 6), i, 0, max_new_tokens=1 + i % 4) for i in range(16)]
    _, tally = NativeEngine(llama, slots=4).generate(rows, SamplingParams(10), KEY)
    tokens = sum(row.max_new_tokens or 0 for row in rows)
    assert tally.sums["rollout/rows_per_step"] == tokens
    assert tally.weights["rollout/rows_per_step"] <= tokens / 4 + 4


def test_a_prompt_is_computed_once_for_all_its_samples_whatever_the_slots(llama: Any) -> None:
    prompts = [tuple(range(3 + i, 20 + i)) for i in range(5)]
    rows = [RolloutRow(prompt, i, sample, max_new_tokens=3 + 2 * sample) for sample in range(4) for i, prompt in enumerate(prompts)]
    computed: list[int] = []
    hook = llama.model.embed_tokens.register_forward_hook(
        lambda _, inputs, __: computed.append(len(inputs[0])) if inputs[0].shape[1] > 1 else None
    )
    try:
        seen = []
        for slots in (3, 7, 20):
            engine = NativeEngine(llama, slots=slots)
            engine.generate(rows[:1], SamplingParams(2), KEY)  # the probe
            computed.clear()
            seen.append(engine.generate(rows, SamplingParams(20), KEY)[0])
            assert sum(computed) == len(prompts)
    finally:
        hook.remove()
    assert seen[0] == seen[1] == seen[2]


def test_weights_are_those_of_the_moment_of_the_call(build: Callable[..., Any], llama: Any, rows: Rows, forward_gap: Any) -> None:
    model = build(llama.config)
    engine = NativeEngine(model, slots=4)
    before, _ = engine.generate(rows, SamplingParams(12), KEY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after, _ = engine.generate(rows, SamplingParams(12), KEY)
    assert before != after and forward_gap(model, rows, after) < 1e-5


def test_a_call_leaves_the_model_ready_to_train(build: Callable[..., Any], llama: Any, rows: Rows) -> None:
    model = build(llama.config).train()
    complete(model, rows, SamplingParams(3))
    assert model.training and model.lm_head.training
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_peft_wrapped_models_sample_with_their_adapter(build: Callable[..., Any], llama: Any, rows: Rows, forward_gap: Any) -> None:
    model = get_peft_model(build(llama.config), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    out = complete(model, rows, SamplingParams(12))
    assert out != complete(llama, rows, SamplingParams(12))
    assert forward_gap(model, rows, out) < 1e-5


def test_bfloat16(build: Callable[..., Any], llama: Any, rows: Rows, forward_gap: Any) -> None:
    model = build(llama.config).bfloat16()
    out = complete(model, rows, SamplingParams(20))
    assert forward_gap(model, rows, out) < 0.3
    assert [c.tokens for c in out] == [c.tokens for c in complete(model, rows, SamplingParams(20), slots=9)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(build: Callable[..., Any], llama: Any, rows: Rows, forward_gap: Any, dtype: torch.dtype) -> None:
    model = build(llama.config).to("cuda", dtype)
    out = complete(model, rows, SamplingParams(20))
    assert forward_gap(model.cpu(), rows, out) < (1e-4 if dtype == torch.float32 else 0.5)


def test_a_real_model(shared: Path, forward_gap: Any) -> None:
    folder = shared / "models" / "stories260K"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    prompt = tuple(tokenizer("Once upon a time").input_ids)
    rows = [RolloutRow(prompt, i, 0) for i in range(24)]
    params = SamplingParams(64, temperature=0.7, stop_tokens=(1, 2), stop_strings=("happy",))
    out = complete(model, rows, params, slots=16, decode=tokenizer.decode)
    texts = [tokenizer.decode(c.tokens) for c in out]
    assert all(("happy" in text) == (c.stop_reason is StopReason.STOP_STRING) for text, c in zip(texts, out, strict=True))
    assert {c.stop_reason for c in out} >= {StopReason.STOP_STRING, StopReason.LENGTH}
    assert sum("there was" in text for text in texts) > 12
    assert forward_gap(model, rows, out, 0.7) < 2e-5  # a plain forward in other batch shapes differs from itself by as much


def test_no_rows(llama: Any) -> None:
    out, tally = NativeEngine(llama, slots=4).generate([], SamplingParams(5), KEY)
    assert out == [] and tally.means() == {}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (RolloutRow((), 3, 0), "no token"),
        (RolloutRow((5,) * 50, 3, 0), "50 tokens and 20 new tokens exceed the model's context of 64"),
        (RolloutRow((5,), 3, 0, max_new_tokens=0), "max_new_tokens of the row is 0"),
    ],
)
def test_rows_that_cannot_be_completed_are_refused_by_id(llama: Any, row: RolloutRow, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        complete(llama, [RolloutRow((5,), 1, 0), row], SamplingParams(20))
    assert "prompt id 3" in caught.value.where


def test_stop_strings_without_decode_and_no_slots_are_refused(llama: Any, rows: Rows) -> None:
    with pytest.raises(UserError, match="tokenizer"):
        complete(llama, rows, SamplingParams(5, stop_strings=("x",)))
    with pytest.raises(UserError, match="slots is 0"):
        NativeEngine(llama, slots=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_stop_the_call(build: Callable[..., Any], llama: Any, rows: Rows, bad: float) -> None:
    model = build(llama.config)
    with torch.no_grad():
        model.lm_head.weight[3, 0] = bad
    with pytest.raises(UserError, match="not finite") as caught:
        complete(model, rows, SamplingParams(5))
    assert "prompt id" in caught.value.where


def test_the_model_is_probed_once(llama: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(native, "check_decoding", lambda *_: calls.append(1))
    engine = NativeEngine(llama, slots=4)
    for _ in range(3):
        engine.generate(rows[:1], SamplingParams(2), KEY)
    assert len(calls) == 1
