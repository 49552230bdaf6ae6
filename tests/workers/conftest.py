"""A tiny run's config with changes, and shards of made-up rollouts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.experience import ExperienceBatch, StopReason


@pytest.fixture
def configured(ppo_values: dict[str, Any]) -> Callable[..., PPOConfig]:
    """`configured({"policy.dtype": "bf16", …})`: the tiny run with values changed by dotted key."""

    def make(changes: dict[str, Any] | None = None) -> PPOConfig:
        values = json.loads(json.dumps(ppo_values))
        for key, value in (changes or {}).items():
            *path, last = key.split(".")
            section = values
            for name in path:
                section = section.setdefault(name, {})
            section[last] = value
        return PPOConfig.model_validate(values)

    return make


@pytest.fixture
def zero(tmp_path: Path) -> Callable[[int], str]:
    """`zero(3)`: a DeepSpeed file of that stage."""

    def write(stage: int) -> str:
        path = tmp_path / f"zero{stage}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        return str(path)

    return write


@pytest.fixture(scope="session")
def shard_of() -> Callable[..., ExperienceBatch]:
    """`shard_of([(prompt tokens, response tokens), …], **fields)`: rollouts with sampler log-probs of −1."""

    def make(rows: list[tuple[list[int], list[int]]], **fields: Any) -> ExperienceBatch:
        prompt, response, count = max(len(p) for p, _ in rows), max(len(r) for _, r in rows), len(rows)
        lengths = torch.tensor([[len(p), len(r)] for p, r in rows])
        mask_BT = torch.arange(response) < lengths[:, 1:]
        batch = ExperienceBatch(
            prompt_tokens_BP=torch.tensor([[0] * (prompt - len(p)) + p for p, _ in rows]),
            prompt_mask_BP=torch.arange(prompt) >= prompt - lengths[:, :1],
            response_tokens_BT=torch.tensor([r + [0] * (response - len(r)) for _, r in rows]),
            response_mask_BT=mask_BT,
            response_attention_BT=mask_BT.clone(),
            prompt_id_B=torch.arange(count),
            sample_index_B=torch.zeros(count, dtype=torch.long),
            policy_version_B=torch.zeros(count, dtype=torch.long),
            stop_reason_B=torch.full((count,), int(StopReason.STOP_TOKEN)),
            rollout_logprobs_BT=torch.where(mask_BT, -1.0, 0.0),
            prompts=tuple(f"prompt {row}" for row in range(count)),
            completions=tuple(f"completion {row}" for row in range(count)),
        )
        return batch.replace(**fields)

    return make


@pytest.fixture(scope="session")
def ragged() -> list[tuple[list[int], list[int]]]:
    """Seven rows of the tiny model's tokens, short and long on both sides."""
    generator = torch.Generator().manual_seed(0)
    lengths = [(1, 6), (5, 1), (2, 3), (4, 4), (1, 1), (3, 6), (5, 2)]
    return [tuple(torch.randint(4, 60, (n,), generator=generator).tolist() for n in pair) for pair in lengths]  # type: ignore[misc]
