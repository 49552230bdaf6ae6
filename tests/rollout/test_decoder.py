"""The model seen as rows in slots: logits equal to a plain forward, whatever was admitted and dropped before, on many architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf

from rlhf_dist.rollout import prefill
from rlhf_dist.rollout.decoder import SlotDecoder
from rlhf_dist.rollout.native import NativeEngine, RolloutRow, SamplingKey
from rlhf_dist.rollout.sampling import SamplingParams
from rlhf_dist.rollout.traits import decoding, read_traits

BASE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**BASE, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 54, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "llama": hf.LlamaConfig(**GROUPED),
    "qwen2": hf.Qwen2Config(**GROUPED),
    "qwen2_sliding": hf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": hf.Qwen3Config(**GROUPED, head_dim=8),
    "mistral_sliding": hf.MistralConfig(**GROUPED, sliding_window=8),
    "gemma2": hf.Gemma2Config(**GROUPED, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "gemma3": hf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "phi": hf.PhiConfig(**GROUPED),
    "phi3_sliding": hf.Phi3Config(**GROUPED, sliding_window=8),
    "gpt_neox": hf.GPTNeoXConfig(**BASE),
    "gpt2": hf.GPT2Config(**GPT2),
    "opt": hf.OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=54,
        word_embed_proj_dim=32, pad_token_id=0,
    ),
    "falcon": hf.FalconConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
    ),
    "mixtral": hf.MixtralConfig(**GROUPED, num_local_experts=4),
}  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_equal_a_full_forward(
    build: Callable[..., Any], rows: list[RolloutRow], forward_gap: Callable[..., float], name: str, attention: str
) -> None:
    model = build(CONFIGS[name], attention)
    completions, _ = NativeEngine(model, slots=3).generate(rows, SamplingParams(24), SamplingKey(0, "train", 0))
    assert forward_gap(model, rows, completions) < 1e-5


@pytest.fixture
def prompts(rows: list[RolloutRow]) -> list[tuple[int, ...]]:
    return [row.prompt_tokens for row in rows]


def plain(model: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    return logits


def test_rows_come_and_go(llama: Any, prompts: list[tuple[int, ...]]) -> None:
    sequences = [list(prompt) for prompt in prompts[:4]]
    with decoding(llama):
        decoder = SlotDecoder(llama, read_traits(llama), slots=5, max_len=48)
        decoder.admit(prompts[:4], [100, 200, 300, 400])
        for step in range(6):
            logits = decoder.step()
            for row, tokens in enumerate(sequences):
                assert torch.allclose(logits[row], plain(llama, tuple(tokens)), atol=1e-5)
            new = torch.arange(decoder.count) + 10 * step
            decoder.feed(new)
            for tokens, token in zip(sequences, new.tolist(), strict=True):
                tokens.append(token)
            if step in (1, 3):
                decoder.drop(0)
                sequences[0] = sequences[-1]
                sequences.pop()
            if step == 2:
                decoder.admit(prompts[4:6], [500, 600])
                sequences += [list(prompt) for prompt in prompts[4:6]]
    assert decoder.count == len(sequences) == 4


def test_the_running_index_follows_its_row(llama: Any, prompts: list[tuple[int, ...]]) -> None:
    with decoding(llama):
        decoder = SlotDecoder(llama, read_traits(llama), slots=3, max_len=48)
        decoder.admit(prompts[:3], [100, 200, 300])
        decoder.step()
        decoder.feed(torch.tensor([3, 4, 5]))
        decoder.drop(0)
        assert decoder.indices_N.tolist() == [301, 201]


@contextmanager
def prefill_shapes(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the token ids of every forward inside."""
    shapes: list[tuple[int, ...]] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    yield shapes
    hook.remove()


def test_equal_prompts_are_prefilled_once_and_prefills_keep_to_their_budget(
    llama: Any, prompts: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with decoding(llama), prefill_shapes(llama) as shapes:
        SlotDecoder(llama, read_traits(llama), slots=8, max_len=48).admit([prompts[2]] * 6 + [prompts[1]], list(range(7)))
        monkeypatch.setattr(prefill, "PREFILL_TOKENS", 24)
        SlotDecoder(llama, read_traits(llama), slots=8, max_len=48).admit([prompts[2], prompts[2][:-1], prompts[4]], list(range(3)))
    assert shapes == [(2, 16), (1, 32), (1, 16), (1, 16)]


def test_a_kept_prefix_is_not_computed_again_even_when_its_rows_are_gone(llama: Any, prompts: list[tuple[int, ...]]) -> None:
    with decoding(llama), prefill_shapes(llama) as shapes:
        decoder = SlotDecoder(llama, read_traits(llama), slots=8, max_len=48)
        decoder.admit([prompts[4], prompts[2]], [0, 0], keep_last=True)
        for token in (3, 4, 5):
            decoder.step()
            decoder.feed(torch.full((decoder.count,), token))
        decoder.drop(1)
        decoder.admit([prompts[2], prompts[1], prompts[2]], [0, 0, 0], keep_last=True)
        decoder.admit([prompts[2]], [0])
        computed = [shape for shape in shapes if shape[1] > 1]
        logits = decoder.step()
    assert computed == [(1, 32), (1, 16), (1, 16)]  # prompts 4, 2 and 1
    for row in (1, 3, 4):
        assert torch.allclose(logits[row], plain(llama, prompts[2]), atol=1e-5)
        assert torch.equal(logits[row], logits[1])


CHUNKED = [name for name in CONFIGS if name not in ("opt", "falcon", "mixtral")]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CHUNKED)
def test_long_prompts_come_in_pieces(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, attention: str) -> None:
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", 16)
    model = build(CONFIGS[name], attention)
    generator = torch.Generator().manual_seed(0)
    long, other, short = (tuple(torch.randint(3, 97, (size,), generator=generator).tolist()) for size in (46, 41, 6))
    with decoding(model):
        alone = SlotDecoder(model, read_traits(model), slots=1, max_len=48)
        alone.admit([long], [0])
        single = alone.step()
        together = SlotDecoder(model, read_traits(model), slots=3, max_len=54)
        together.admit([short, long, other], [0, 0, 0])
        logits = together.step()
    model.config._attn_implementation = attention
    for row, prompt in enumerate((short, long, other)):
        assert torch.allclose(logits[row], plain(model, prompt), atol=2e-5)
    assert torch.equal(logits[1], single[0])


def test_no_forward_is_wider_than_a_piece(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "PREFILL_CHUNK", 16)
    with decoding(llama), prefill_shapes(llama) as shapes:
        SlotDecoder(llama, read_traits(llama), slots=2, max_len=64).admit([(5,) * 60, (6,) * 60], [0, 0])
    assert shapes == [(2, 16), (2, 16), (2, 16), (2, 16)]


def test_prompts_of_one_token_need_no_prefill(llama: Any) -> None:
    with decoding(llama):
        decoder = SlotDecoder(llama, read_traits(llama), slots=2, max_len=8)
        decoder.admit([(5,), (6,)], [0, 0])
        logits = decoder.step()
    assert torch.allclose(logits[1], plain(llama, (6,)), atol=1e-5)
