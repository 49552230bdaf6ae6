"""The root config: what a run needs at least, what its sections must agree on, and that all of it loads without torch."""

import subprocess
import sys

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.loading import load_config
from rlhf_dist.config.ppo import PPOConfig

SMALLEST = [
    "data.train=prompts.jsonl",
    "policy.model=tiny",
    "reward.sources=[{kind: function, name: length, path: rewards.py:length}]",
]


def load(*overrides):
    return load_config(PPOConfig, None, [*SMALLEST, *overrides])


def test_three_keys_make_a_run():
    config = load()
    assert config.needs_value and config.needs_reference
    assert config.data.train == ["prompts.jsonl"] and config.policy.model == "tiny"


@pytest.mark.parametrize("left_out", range(3))
def test_each_of_the_three_is_needed_and_named(left_out):
    section = SMALLEST[left_out].split(".")[0]
    with pytest.raises(UserError, match=f"{section}: Field required"):
        load_config(PPOConfig, None, SMALLEST[:left_out] + SMALLEST[left_out + 1 :])


def test_only_gae_starts_a_value_engine_and_lora_starts_no_reference():
    assert not load("algorithm.estimator=reinforce").needs_value
    assert not load("policy.lora={}").needs_reference


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.minibatches=65"], "algorithm.minibatches is 65, but a step has only 64 completions"),
        (["algorithm.estimator=rloo"], "rollout.samples_per_prompt must be at least 2"),
        (["algorithm.estimator=grpo"], "algorithm.estimator grpo compares a prompt's samples"),
        (["policy.ranks=4", "rollout.prompts_per_step=7", "rollout.shards_per_rank=2"], "some ranks would have nothing to generate"),
        (["rollout.ranks=1", "placement.launcher=spmd"], "needs Ray"),
        (["rollout.ranks=4", "rollout.prompts_per_step=7", "rollout.shards_per_rank=2"], r"rollout.ranks × rollout.shards_per_rank"),
        (["reward.soft_overlong.buffer=129"], "reward.soft_overlong.buffer is larger than rollout.max_new_tokens"),
        (["reward.minimum_length.tokens=129"], "reward.minimum_length.tokens is larger than rollout.max_new_tokens"),
        (["policy.lora={}", "reference.model=other"], "leave reference.model empty"),
    ],
)
def test_sections_that_contradict_each_other_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        load(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.minibatches=64"],
        ["algorithm.estimator=rloo", "rollout.samples_per_prompt=2"],
        ["policy.ranks=4", "rollout.prompts_per_step=8", "rollout.shards_per_rank=2"],
        ["policy.ranks=4", "rollout.prompts_per_step=2", "placement.launcher=spmd"],  # there the launcher decides the ranks
        ["rollout.ranks=4", "rollout.prompts_per_step=8", "rollout.shards_per_rank=2"],
        ["rollout.ranks=1", "policy.ranks=4", "rollout.prompts_per_step=2"],  # the policy's ranks sample nothing then
        ["rollout.ranks=1", "policy.lora={}"],
        ["reward.soft_overlong.buffer=128"],
    ],
)
def test_the_edges_of_those_checks_are_accepted(overrides):
    assert load(*overrides)


@pytest.mark.parametrize(
    ("overrides", "cap"),
    [
        ([], None),
        (["rollout.max_staleness=1"], 2.0),
        (["rollout.max_staleness=1", "algorithm.importance.correction=none"], None),
        (["algorithm.importance.correction=truncated", "algorithm.importance.cap=3"], 3.0),  # for a sampler of other numerics
    ],
)
def test_stale_samples_are_weighted_unless_the_config_says_otherwise(overrides, cap):
    assert load(*overrides).importance_cap == cap


def test_stale_log_probs_cannot_be_the_old_ones():
    with pytest.raises(UserError, match=r"rollout.max_staleness 2 they are an older policy's: set algorithm.old_logprobs: recompute"):
        load("rollout.max_staleness=2", "algorithm.old_logprobs=sampler")


def test_engines_that_take_turns_cannot_overlap():
    with pytest.raises(UserError, match=r"placement.offload: idle lets one engine work at a time: set one of the two back"):
        load("rollout.max_staleness=1", "rollout.ranks=1", "placement.offload=idle")
    assert load("rollout.ranks=1", "placement.offload=idle").placement.offload == "idle"


def test_no_runtime_is_imported_by_the_configuration():
    program = """
import importlib, pkgutil, sys
import rlhf_dist.config
names = [m.name for m in pkgutil.iter_modules(rlhf_dist.config.__path__)]
for name in names:
    importlib.import_module(f"rlhf_dist.config.{name}")
heavy = {"torch", "transformers", "ray", "deepspeed", "numpy"} & set(sys.modules)
print(len(names), sorted(heavy))
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True).stdout.split(
        maxsplit=1
    )
    assert int(answer[0]) >= 13
    assert answer[1].strip() == "[]"
