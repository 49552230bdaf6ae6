"""What the rollout tests share: a tiny random model, rows to complete, and the slow reference for their log-probs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from rlhf_dist.rollout.native import Completion, RolloutRow

VOCABULARY = 97


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tests share their machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """`build(config)`: a random model of that config with weights large enough that every part of it matters."""

    def make(config: PretrainedConfig, attention: str = "sdpa") -> Any:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        return model

    return make


@pytest.fixture(scope="session")
def llama(build: Callable[..., Any]) -> Any:
    """Two layers, grouped-query attention, vocabulary 97, context 64. Tests leave its weights as they are."""
    return build(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )  # fmt: skip


@pytest.fixture(scope="session")
def rows() -> list[RolloutRow]:
    """Nine prompts of 1 to 30 tokens; two are equal but for their ids."""
    generator = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(3, VOCABULARY, (size,), generator=generator).tolist()) for size in (1, 5, 12, 3, 20, 7, 7, 30)]
    return [RolloutRow(prompt, 10 + i, i % 2) for i, prompt in enumerate([*prompts, prompts[1]])]


@pytest.fixture(scope="session")
def forward_gap() -> Callable[..., float]:
    """`forward_gap(model, rows, completions, temperature)`: largest difference to log-probs from one plain forward per sequence."""

    @torch.no_grad()
    def gap(model: Any, rows: Sequence[RolloutRow], completions: Sequence[Completion], temperature: float = 1.0) -> float:
        gaps = []
        for row, completion in zip(rows, completions, strict=True):
            tokens = torch.tensor([row.prompt_tokens + completion.tokens])
            logprobs = (model(input_ids=tokens, use_cache=False).logits[0].float() / temperature).log_softmax(-1)
            chosen = logprobs[len(row.prompt_tokens) - 1 : -1].gather(1, tokens[0, len(row.prompt_tokens) :, None])[:, 0]
            gaps.append((chosen - torch.tensor(completion.logprobs)).abs().max().item())
        return max(gaps)

    return gap
