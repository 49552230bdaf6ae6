from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_dist.cli.programs import PPOProgram
from rlhf_dist.cli.spmd_launch import spmd_groups
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.contracts.roles import PolicyRole
from rlhf_dist.coordinator.preflight import check_first_minibatch, check_gaps, check_versions, preflight, reference_is_policy
from rlhf_dist.coordinator.shards import Groups
from rlhf_dist.engines.process import free_port, start_process_group, stop_process_group
from rlhf_dist.rewards.sources import guarded

FP32 = {"ratio/mean": 1e-6, "ratio/max": 2e-5, "sampler/mean": 1e-6, "sampler/max": 1e-5, "reference/mean": 0.0, "reference/max": 0.0}


@pytest.fixture(scope="module")
def config(tiny_run: Callable[[Path], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> PPOConfig:
    return PPOConfig.model_validate(tiny_run(tmp_path_factory.mktemp("preflight")))


@pytest.fixture(scope="module")
def groups(config: PPOConfig) -> Iterator[Groups]:
    """The real engines of the tiny run, in this process."""
    rank = start_process_group(0, 1, 0, "127.0.0.1", free_port())
    with spmd_groups(PPOProgram(config), rank) as by_role:
        groups = Groups(**by_role)
        groups.policy.collect(groups.policy.submit(PolicyRole.sync_weights, [(0,)]))
        yield groups
    stop_process_group()


def test_a_healthy_run_passes_and_shows_its_gaps(config: PPOConfig, groups: Groups) -> None:
    seen = preflight(config, groups, 0)
    assert set(seen) == {f"preflight/{name}/{statistic}" for name in ("ratio", "sampler", "reference") for statistic in ("mean", "max")}
    assert 0 <= seen["preflight/ratio/mean"] <= 1e-5 and 0 < seen["preflight/sampler/max"] <= 1e-4
    assert seen["preflight/reference/max"] == 0.0


@contextmanager
def perturbed(model: torch.nn.Module) -> Iterator[None]:
    """Moves the weights a little, and back."""
    weight = next(model.parameters())
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    yield
    with torch.no_grad():
        weight.copy_(before)


def test_a_sampler_with_other_weights_is_named(config: PPOConfig, groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = groups.policy._worker._sampler._sampler._engine  # type: ignore[attr-defined]
    monkeypatch.setattr(engine, "_model", copy.deepcopy(engine._model))
    with perturbed(engine._model), pytest.raises(UserError, match=r"sampler and trainer disagree: mean .* in fp32") as error:
        preflight(config, groups, 0)
    assert "other weights, another temperature" in error.value.fix and "preflight" in error.value.where


def test_a_reference_with_other_weights_is_named(config: PPOConfig, groups: Groups) -> None:
    model = groups.reference._worker._engine.module.model  # type: ignore[union-attr, attr-defined]
    with perturbed(model), pytest.raises(UserError, match="KL to the reference is not 0 at step 0") as error:
        preflight(config, groups, 0)
    assert "likely causes: reference and policy are loaded differently" in error.value.fix


def test_dropout_is_named(config: PPOConfig, groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that a forward draws afresh, as dropout does."""
    module = groups.policy._worker._engine.module  # type: ignore[attr-defined]
    plain = type(module).forward

    def noisy(self: Any, *given: Any, **options: Any) -> dict[str, Any]:
        outputs = plain(self, *given, **options)
        return outputs | {"logprobs_BT": outputs["logprobs_BT"] + 0.05 * torch.randn(outputs["logprobs_BT"].shape)}

    monkeypatch.setattr(type(module), "forward", noisy)
    with pytest.raises(UserError, match="the policy disagrees with itself") as error:
        preflight(config, groups, 0)
    assert "dropout is on" in error.value.fix


def test_a_reward_may_abstain_on_the_probes_but_not_fail(
    config: PPOConfig, groups: Groups, reward_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("abstains", "nan"):
        rules = type(config.reward.sources[0])(kind="function", name="even", path=f"{reward_file}:{name}")
        reward = guarded(rules)  # type: ignore[arg-type]
        monkeypatch.setattr(groups.reward._worker, "_rewards", [reward])  # type: ignore[attr-defined]
        if name == "abstains":
            preflight(config, groups, 0)
        else:
            with pytest.raises(UserError, match="'even' returned nan"):
                preflight(config, groups, 0)
        reward.close()


def test_a_policy_that_has_learnt_is_not_its_reference(config: PPOConfig, groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on: sampler and trainer must agree as ever, the KL may be anything."""
    held: list[bool] = []
    monkeypatch.setattr("rlhf_dist.coordinator.preflight.check_gaps", lambda seen, dtype, *, same_reference: held.append(same_reference))
    preflight(config, groups, 0)
    groups.policy.collect(groups.policy.submit(PolicyRole.sync_weights, [(1,)]))
    preflight(config, groups, 1)
    groups.policy.collect(groups.policy.submit(PolicyRole.sync_weights, [(0,)]))
    assert held == [True, False]


def test_preflight_asks_little_of_a_large_run(config: PPOConfig, groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    worker = groups.policy._worker  # type: ignore[attr-defined]
    generate = worker.generate
    monkeypatch.setattr(worker, "generate", lambda request: asked.append(request) or generate(request))
    preflight(config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_new_tokens": 64})}), groups, 0)
    assert [(request.count, request.samples_per_prompt, request.max_new_tokens) for request in asked] == [(2, 1, 16)]


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"reference": {"model": "other"}}, False),
        ({"reference": {"dtype": "bf16"}}, False),
        ({"reference": {"quantize": "nf4"}}, False),
        ({"policy": {"model": "p", "dtype": "bf16"}, "reference": {"dtype": "bf16", "model": "p"}}, True),
        ({"policy": {"model": "p", "dtype": "bf16", "lora": {}}}, True),
    ],
)
def test_kl_must_be_zero_only_where_the_reference_is_the_policy(ppo_values: dict[str, Any], changes: dict[str, Any], same: bool) -> None:
    assert reference_is_policy(PPOConfig.model_validate(ppo_values | changes)) is same


def test_tolerances_of_fp32() -> None:
    check_gaps(FP32, "fp32", same_reference=True)
    for name, value in (
        ("ratio/mean", 1.1e-5),
        ("ratio/max", 2e-3),
        ("sampler/mean", 2e-4),
        ("sampler/max", 0.02),
        ("reference/mean", 2e-5),
    ):
        with pytest.raises(UserError, match=r"\(allowed "):
            check_gaps(FP32 | {name: value}, "fp32", same_reference=True)
    check_gaps(FP32 | {"reference/mean": 3.0, "reference/max": 9.0}, "fp32", same_reference=False)


def test_half_precision_is_held_to_the_mean() -> None:
    loose = FP32 | {"ratio/mean": 4e-3, "ratio/max": 0.5, "sampler/mean": 1e-2, "sampler/max": 0.5}
    check_gaps(loose, "bf16", same_reference=True)
    with pytest.raises(UserError, match="in bf16"):
        check_gaps(loose | {"ratio/mean": 6e-3}, "bf16", same_reference=True)
    with pytest.raises(UserError):
        check_gaps(loose, "fp32", same_reference=True)


def test_nan_is_a_breach() -> None:
    for dtype in ("fp32", "bf16"):
        with pytest.raises(UserError, match="mean nan"):
            check_gaps(FP32 | {"ratio/mean": float("nan")}, dtype, same_reference=True)


FIRST = {"val/ratio_mean_deviation": 1e-6, "val/ratio_max_deviation": 2e-5, "policy/clipfrac_avg": 0.0}


def test_the_first_minibatch_must_have_ratio_one() -> None:
    check_first_minibatch(FIRST, "fp32", 4)
    with pytest.raises(UserError, match=r"mean \|ρ − 1\| 0.2 \(allowed 1e-05\), clip fraction 0.5 \(allowed 0\) in fp32") as error:
        check_first_minibatch(FIRST | {"val/ratio_mean_deviation": 0.2, "policy/clipfrac_avg": 0.5}, "fp32", 4)
    assert error.value.where.startswith("step 5, first minibatch")
    assert "padding reaches attention" in error.value.fix
    half = {"val/ratio_mean_deviation": 4e-3, "val/ratio_max_deviation": 0.3, "policy/clipfrac_avg": 5e-4}
    check_first_minibatch(half, "bf16", 0)
    with pytest.raises(UserError, match=r"clip fraction 0\.002"):
        check_first_minibatch(half | {"policy/clipfrac_avg": 2e-3}, "fp16", 0)


def test_with_the_samplers_log_probs_the_remedy_is_to_recompute_them() -> None:
    with pytest.raises(UserError, match="sampler and trainer disagree") as error:
        check_first_minibatch(FIRST | {"val/ratio_mean_deviation": 0.2}, "fp32", 4, sampled=True)
    assert "algorithm.old_logprobs=recompute" in error.value.fix


def test_a_step_of_the_value_model_alone_has_no_ratio() -> None:
    report: dict[str, float] = {}
    assert check_first_minibatch(report, "fp32", 0) is None  # type: ignore[func-returns-value]


def test_completions_of_another_version_than_was_synced_are_refused(sampled_shard: Any) -> None:
    shards = [sampled_shard((3, 4)), sampled_shard((2,))]
    check_versions(shards, 0)
    with pytest.raises(UserError, match="completions are of policy version 0, the trainer holds version 3") as refused:
        check_versions(shards, 3)
    assert "law 8" in refused.value.where
