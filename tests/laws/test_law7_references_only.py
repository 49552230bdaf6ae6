"""Law 7: what passes through the coordinator grows with the number of samples, never with the number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.cli.programs import PPOProgram
from rlhf_dist.cli.ray_launch import ray_groups
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.roles import PolicyRole
from rlhf_dist.coordinator.experience import Coefficients, estimate
from rlhf_dist.coordinator.judging import judge
from rlhf_dist.coordinator.shards import Batch, Groups, collect_rollouts, collect_scores, generate, score
from rlhf_dist.coordinator.update import Updater
from rlhf_dist.rewards.mixture import RewardMixer

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
PROMPTS = 16


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, prompts_file: Path, reward_file: Path) -> PPOConfig:
    """A model that never stops, with room for 512 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("endless")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.max_position_embeddings = 600
    model.config.eos_token_id = model.generation_config.eos_token_id = 10_000  # no such token
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    small = {"cpus_per_rank": 0.5, "microbatch_tokens": 4096}
    values: dict[str, Any] = {
        "data": {"train": str(prompts_file), "max_prompt_tokens": 16},
        "policy": {"model": str(folder), **small},
        "value": small,
        "reference": small,
        "reward": {"sources": [{"name": "even", "kind": "function", "path": f"{reward_file}:even"}], **small},
        "rollout": {"prompts_per_step": PROMPTS, "max_new_tokens": 512},
        "algorithm": {"epochs": 2, "minibatches": 2},
    }
    return PPOConfig.model_validate(values)


@pytest.fixture(scope="module")
def groups(config: PPOConfig, ray_session: None) -> Iterator[Groups]:
    with ray_groups(PPOProgram(config)) as by_role:
        groups = Groups(**by_role)
        groups.policy.collect(groups.policy.submit(PolicyRole.sync_weights, [(0,)]))
        yield groups


def one_step(config: PPOConfig, groups: Groups, tokens: int) -> tuple[float, float]:
    """Bytes through the coordinator and response tokens, each a sample, of all phases of a step."""
    before = sum(group.bytes_sent + group.bytes_received for group in groups.all())  # type: ignore[attr-defined]
    shards = generate(groups.policy, Batch("train", 0, 0, PROMPTS, 1, tokens), 0, 1)
    score(groups, shards, with_value=True)
    collect_rollouts(groups.policy, shards)
    collect_scores(groups, shards)
    judged = judge(RewardMixer(config.reward, 512), shards, 1, update=True)
    experience = estimate(groups.policy, shards, judged, Coefficients(0.05, 0.0), whiten_rewards=False)
    Updater(config, groups).update(0, experience)
    after = sum(group.bytes_sent + group.bytes_received for group in groups.all())  # type: ignore[attr-defined]
    return (after - before) / PROMPTS, sum(experience.valid_tokens) / PROMPTS


def test_bytes_a_sample_do_not_grow_with_tokens(config: PPOConfig, groups: Groups) -> None:
    short_bytes, short_tokens = one_step(config, groups, 64)
    long_bytes, long_tokens = one_step(config, groups, 512)
    assert long_tokens > 5 * short_tokens > 5 * 40, "the completions differ in length, or the test shows nothing"
    assert abs(long_bytes / short_bytes - 1) < 0.05, (short_bytes, long_bytes)
