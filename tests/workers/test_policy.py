"""One rank of the policy through a whole step: sample, score, estimate, train, sync, at ZeRO 0 and 3, with and without an adapter."""

import dataclasses
import errno
import math
import os
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.moments import Moments
from rlhf_dist.contracts.roles import EstimateRequest, GenerateRequest, UpdateRequest
from rlhf_dist.engines.process import Rank
from rlhf_dist.models.policy import PolicyModule
from rlhf_dist.workers.policy import PolicyWorker


@pytest.fixture
def worker_of(configured, zero, plain_rank) -> Any:
    """`worker_of(stage, changes)`: a policy whose sampler holds version 0; REINFORCE, so that it needs no value model."""

    def make(stage: int = 0, changes: dict[str, Any] | None = None) -> PolicyWorker:
        base = {"policy.deepspeed": zero(stage), "algorithm.estimator": "reinforce", "policy.microbatch_tokens": 40}
        worker = PolicyWorker(configured(base | (changes or {})), plain_rank)
        worker.sync_weights(0)
        return worker

    return make


def request(start: int = 0, count: int = 4, **options: Any) -> GenerateRequest:
    given = {"stream": "train", "step": 0, "step_start": 0, "samples_per_prompt": 2, "version": 0} | options
    return GenerateRequest(**given, start=start, count=count)


def scored(worker: PolicyWorker, shard: Any) -> list[Any]:
    """Old log-probs, and the same as reference: KL is 0."""
    piece = worker.score(shard).payload
    reference = dataclasses.replace(piece, tensors={"ref_logprobs_BT": piece.tensors["old_logprobs_BT"]})
    return [piece, reference]


def train(worker: PolicyWorker, shard: Any) -> Any:
    """One optimizer step on alternating scores."""
    scores = tuple(float(row % 2) for row in range(len(shard)))
    asked = EstimateRequest(scores, {}, (True,) * len(shard), 0.1, 0.5)
    experience = worker.estimate(asked, shard, scored(worker, shard))
    worker.load_experience([experience.payload], experience.info.advantages)
    rows = tuple(range(len(shard)))
    return worker.update(UpdateRequest((rows[:3], rows[3:]), float(sum(experience.info.valid_tokens))))


def tokens(shard: Any) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(shard.response_tokens_BT, shard.response_mask_BT, strict=True)]


def test_a_worker_describes_model_and_data(worker_of, tiny_model) -> None:
    facts = worker_of().describe()
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    assert facts["parameters"] == facts["trained_parameters"] == parameters and facts["stop_tokens"] == [2] and facts["device"] == "cpu"
    assert 0 < facts["held_out_prompts"] < 40
    assert worker_of(3).describe() == facts  # sharded parameters are counted whole
    adapted = worker_of(0, {"policy.lora": {"r": 2}}).describe()
    assert adapted["parameters"] == parameters + adapted["trained_parameters"] and adapted["trained_parameters"] < parameters / 2
    assert worker_of(0, {"data.eval_fraction": 0.0}).describe()["held_out_prompts"] == 0


@pytest.mark.parametrize("stage", [0, 3])
def test_samples_of_a_version_that_the_sampler_does_not_hold_are_refused(stage, worker_of) -> None:
    worker = worker_of(stage)
    with pytest.raises(UserError, match="policy version 1, but the sampler holds 0") as caught:
        worker.generate(request(version=1))
    assert caught.value.where == "policy rank 0, generate"
    worker.sync_weights(1)
    assert worker.generate(request(version=1)).info.versions == (1,) * 8
    with pytest.raises(UserError, match="policy version 0, but the sampler holds 1"):
        worker.generate(request(version=0))


def test_costs_are_those_of_the_whole_policy(worker_of) -> None:
    assert worker_of().costs() == worker_of(3).costs()
    assert worker_of().costs().head == 2 * 32 * 64 and worker_of().costs().attention == 2 * 2 * 32


def test_nothing_is_sampled_before_the_first_sync(configured, plain_rank) -> None:
    with pytest.raises(UserError, match="holds -1"):
        PolicyWorker(configured(), plain_rank).generate(request())


@pytest.mark.parametrize("stage", [0, 3])
def test_packed_rows_score_and_train_as_padded_ones(stage, worker_of) -> None:
    """The policy with its adapter, without it, law 3, and an optimizer step."""
    changes = {"policy.lora": {"r": 2}}
    padded, packed = worker_of(stage, changes), worker_of(stage, changes | {"policy.packing": True})
    shard = padded.generate(request()).payload
    assert tokens(shard) == tokens(packed.generate(request()).payload)
    for method, name in (("score", "old_logprobs_BT"), ("reference_score", "ref_logprobs_BT")):
        mine, reference = (getattr(worker, method)(shard).payload.tensors[name][shard.response_mask_BT] for worker in (packed, padded))
        assert torch.allclose(mine, reference, atol=1e-5)
    assert packed.ratio_check(shard, scored(packed, shard)).tally.means()["ratio/max"] < 1e-5
    steps = [train(worker, shard).step.grad_norm for worker in (packed, padded)]
    assert steps[0] == pytest.approx(steps[1], rel=1e-4) and steps[1] > 0


@pytest.mark.parametrize("lora", [None, {"r": 2}])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_training_forward_agrees_with_the_sampler_and_training_moves_both(stage, lora, worker_of) -> None:
    """A step, twice: law 3 holds after every sync, at any ZeRO stage, for whole models and for adapters."""
    worker = worker_of(stage, {"policy.lora": lora})
    sums = [worker.sync_weights(0)]
    for version in range(2):
        shard = worker.generate(request(version=version, step=version)).payload
        gaps = worker.ratio_check(shard, scored(worker, shard)).tally.means()
        assert gaps["ratio/max"] < 1e-5 and gaps["sampler/max"] < 1e-4 and gaps["reference/max"] == 0.0
        if lora:
            off = worker.reference_score(shard).payload.tensors["ref_logprobs_BT"]
            if version:
                assert not torch.allclose(off, worker.score(shard).payload.tensors["old_logprobs_BT"], atol=1e-4)
            else:
                reference, first_shard = off, shard
        info = train(worker, shard)
        assert info.step.grad_norm > 0 and info.tally.means()["val/ratio"] == pytest.approx(1, abs=1e-5)
        sums.append(worker.sync_weights(version + 1))
    assert len(set(sums)) == 3, "every step changes the weights, and the checksum says so"
    if lora:
        assert torch.allclose(worker.reference_score(first_shard).payload.tensors["ref_logprobs_BT"], reference, atol=1e-6)


def test_under_zero_3_the_sampler_keeps_its_version_until_the_sync(worker_of) -> None:
    worker = worker_of(3, {"policy.optim.lr": 0.05})
    before = worker.generate(request()).payload
    train(worker, before)
    assert tokens(worker.generate(request()).payload) == tokens(before)
    worker.sync_weights(1)
    assert tokens(worker.generate(request(version=1)).payload) != tokens(before)


def test_zero_3_samples_and_syncs_as_zero_0_does(worker_of) -> None:
    plain, sharded = worker_of(0), worker_of(3)
    same, copied = plain.sync_weights(0), sharded.sync_weights(0)
    assert same.checksum == copied.checksum and (same.bytes, same.buckets) == (0, 0) and copied.bytes > 50_000 and copied.buckets == 1
    assert tokens(plain.generate(request()).payload) == tokens(sharded.generate(request()).payload)


def test_log_probs_are_at_the_sampling_temperature(worker_of) -> None:
    worker = worker_of(0, {"rollout.temperature": 0.5})
    shard = worker.generate(request()).payload
    old, mask = worker.score(shard).payload.tensors["old_logprobs_BT"], shard.response_mask_BT
    torch.testing.assert_close(old[mask], shard.rollout_logprobs_BT[mask], rtol=1e-4, atol=1e-4)


def test_shards_of_a_step_read_the_prompts_that_one_shard_would(worker_of, prompts_file) -> None:
    """Whatever order they are asked in, and preflight before them; a later step goes on where the step ends."""
    whole = worker_of().generate(request(count=6)).payload
    worker = worker_of()
    worker.generate(request(count=2, step=2**31 - 1))
    parts = [worker.generate(request(start, count)).payload for start, count in ((0, 1), (1, 3), (4, 2))]
    assert [p for part in parts for p in part.prompts] == list(whole.prompts)
    assert [t for part in parts for t in tokens(part)] == tokens(whole)
    following = worker.generate(request(6, 2, step=1, step_start=6)).payload
    assert set(following.prompts).isdisjoint(whole.prompts)
    last_shard_alone = worker_of().generate(request(4, 2)).payload
    assert tokens(last_shard_alone) == tokens(parts[2])


def test_held_out_prompts_are_never_trained_on(worker_of) -> None:
    worker = worker_of()
    held_out = worker.describe()["held_out_prompts"]
    evaluated = worker.generate(request(count=held_out, stream="eval", samples_per_prompt=1)).payload
    trained = worker.generate(request(count=80, samples_per_prompt=1)).payload
    assert set(evaluated.prompts).isdisjoint(trained.prompts) and len(evaluated) == held_out
    assert len(worker_of(0, {"evaluation.max_prompts": 3})._prompts.held_out) == 3


def test_rollouts_are_written_by_rank_0_dropped_samples_included(worker_of, configured, tmp_path) -> None:
    worker = worker_of()
    shards = [worker.generate(request(0, 2)).payload, worker.generate(request(2, 1)).payload]
    pieces = [scored(worker, shard) for shard in shards]
    details = [
        {"reward/even": [1.0, None, 0.5, 2.0], "kept": [False, False, True, True], "score": [None, None, 0.5, 2.0]},
        {"reward/even": [3.0, 4.0], "kept": [True, True], "score": [3.0, 4.0]},
    ]
    info = worker.write_rollouts(str(tmp_path / "rollouts.parquet"), shards, pieces, details)
    table = pq.read_table(tmp_path / "rollouts.parquet").to_pydict()
    assert info.rows == 6 and info.kl == (0.0,) * 6 and table["kept"] == [False, False, True, True, True, True]
    assert table["completion"] == [c for shard in shards for c in shard.completions] and table["reward/even"][:2] == [1.0, None]
    worker._rank = Rank(1, 2, 0, "cpu")
    assert worker.write_rollouts(str(tmp_path / "other.parquet"), shards, pieces, details).rows == 0
    assert not (tmp_path / "other.parquet").exists()


def test_the_schedule_ends_with_the_run_also_after_steps_that_train_the_value_model_alone(worker_of) -> None:
    """Two of three PPO steps train the policy: linear decay from the peak over their optimizer steps."""
    changes = {"run.steps": 3, "value.warmup_steps": 1, "algorithm.epochs": 1, "algorithm.minibatches": 2, "algorithm.estimator": "gae"}
    worker = worker_of(0, changes)
    batch = worker.generate(request()).payload
    zeros = torch.zeros(batch.response_mask_BT.shape)
    worker.load_experience([batch.replace(old_logprobs_BT=zeros, advantages_BT=zeros + 1)], Moments(8, 0.0, 8.0))
    rates = [worker.update(UpdateRequest(((0,),), 1.0)).step.lr for _ in range(4)]
    assert rates == pytest.approx([1e-3 * factor for factor in (1, 0.75, 0.5, 0.25)])


def test_an_export_is_the_trained_policy(worker_of, tmp_path) -> None:
    worker = worker_of(0, {"policy.optim.lr": 0.05, "policy.lora": {"r": 2}})
    shard = worker.generate(request()).payload
    train(worker, shard)
    worker.export(str(tmp_path / "export"))
    other = worker_of(0, {"policy.model": str(tmp_path / "export")})
    torch.testing.assert_close(
        other.score(shard).payload.tensors["old_logprobs_BT"], worker.score(shard).payload.tensors["old_logprobs_BT"], rtol=1e-4, atol=1e-4
    )


def test_entropy_is_trained_on_only_with_a_coefficient(worker_of) -> None:
    assert worker_of(0)._engine.module.options.entropy_grad is False
    worker = worker_of(0, {"algorithm.entropy_coef": 0.5})
    assert worker._engine.module.options.entropy_grad is True
    info = train(worker, worker.generate(request()).payload)
    assert math.isfinite(info.tally.means()["loss/policy_avg"]) and info.step.grad_norm > 0


def test_under_zero_3_in_bf16_the_sampler_holds_the_adapters_and_not_a_rounded_sum(worker_of) -> None:
    """Merged in bf16 the sampler's policy would be another one than the trained one. Both are the same module on the same rows here."""
    worker = worker_of(3, {"policy.dtype": "bf16", "policy.lora": {"r": 4}, "policy.optim.lr": 0.02})
    for version in range(3):
        train(worker, worker.generate(request(version=version, step=version)).payload)
        worker.sync_weights(version + 1)
    shard = worker.generate(request(version=3, step=3)).payload
    sampler = PolicyModule(worker._copy.model, worker._engine.module.options)
    with torch.no_grad():
        copied = sampler(**sampler.inputs(shard))["logprobs_BT"]
    assert torch.equal(copied[shard.response_mask_BT], worker.score(shard).payload.tensors["old_logprobs_BT"][shard.response_mask_BT])
    gaps = worker.ratio_check(shard, scored(worker, shard)).tally.means()
    assert gaps["sampler/mean"] < 0.02


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 3])
def test_over_4_bits_it_samples_trains_syncs_and_keeps_its_reference(stage, dtype, worker_of, wide_model) -> None:
    """Under ZeRO 3 the sampler's copy is quantised on its own and gets the adapters alone."""
    policy = {"model": str(wide_model), "dtype": dtype, "quantize": "nf4", "lora": {"r": 4}, "optim": {"lr": 0.02}}
    worker = worker_of(stage, {"policy": policy | {"deepspeed": worker_of(stage)._section.deepspeed}})
    first = worker.generate(request()).payload
    mask = first.response_mask_BT
    before = worker.reference_score(first).payload.tensors["ref_logprobs_BT"][mask]
    sums = [worker.sync_weights(0)]
    for version in range(2):
        shard = worker.generate(request(version=version, step=version)).payload
        gaps = worker.ratio_check(shard, scored(worker, shard)).tally.means()
        assert gaps["ratio/mean"] < (1e-5 if dtype == "fp32" else 5e-3) and gaps["sampler/mean"] < (1e-4 if dtype == "fp32" else 0.05)
        assert train(worker, shard).step.grad_norm > 0
        sums.append(worker.sync_weights(version + 1))
    assert len(set(sums)) == 3
    after = worker.score(first).payload.tensors["old_logprobs_BT"][mask]
    assert not torch.allclose(after, before, atol=1e-2)
    assert torch.allclose(worker.reference_score(first).payload.tensors["ref_logprobs_BT"][mask], before, atol=1e-6)
    facts = worker.describe()
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(wide_model).parameters())
    assert facts["parameters"] == whole + facts["trained_parameters"]


def test_over_4_bits_an_export_answers_as_the_policy_does(worker_of, wide_model, tmp_path) -> None:
    policy = {"model": str(wide_model), "quantize": "nf4", "lora": {"r": 4}, "optim": {"lr": 0.02}}
    worker = worker_of(0, {"policy": policy})
    shard = worker.generate(request()).payload
    train(worker, shard)
    worker.export(str(tmp_path / "export"))
    module = PolicyModule(AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval())
    with torch.no_grad():
        got = module(**module.inputs(shard))["logprobs_BT"]
    want, mask = worker.score(shard).payload.tensors["old_logprobs_BT"], shard.response_mask_BT
    torch.testing.assert_close(got[mask], want[mask], rtol=1e-5, atol=1e-5)
    again = worker_of(0, {"policy": {"model": str(tmp_path / "export" / "adapter"), "optim": {"lr": 0.02}}})
    assert again.score(shard).payload.tensors["old_logprobs_BT"].isfinite().all()  # an adapter folder is a model


@pytest.mark.parametrize("stage", [0, 3])
def test_beside_a_rollout_group_it_holds_no_sampler_and_no_copy(stage, worker_of, configured, zero, plain_rank) -> None:
    """What it exports is what its own sampler would get."""
    changes = {"policy.deepspeed": zero(stage), "rollout.ranks": 1, "placement.launcher": "ray"}
    worker = PolicyWorker(configured(changes), plain_rank)
    assert worker._copy is None and worker._sampler is None
    assert worker.describe() == worker_of(stage).describe()
    with pytest.raises(AssertionError, match="rollout group samples"):
        worker.generate(request())
    with pytest.raises(AssertionError, match="rollout group samples"):
        worker.sync_weights(0)
    bucket, done = worker.next_weights(10**9), worker.next_weights(10**9)
    assert done.info.done is not None and done.payload == {}
    assert done.info.done.checksum == worker_of(3).sync_weights(0).checksum
    assert bucket.info.bytes == done.info.done.bytes == sum(weight.nbytes for weight in bucket.payload.values())
    assert worker.place().device == "cpu"


def test_a_disk_that_is_full_when_rollouts_come_to_it_is_told_in_words(worker_of, tmp_path, monkeypatch) -> None:
    """What is written may lie in memory until it is synced."""
    worker = worker_of()
    rollouts = worker.generate(request())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert len(worker.save_rollouts(str(tmp_path / "a"), [rollouts.payload], [rollouts.info])) == 2
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full") as caught:
        worker.save_rollouts(str(tmp_path / "b"), [rollouts.payload], [rollouts.info])
    assert caught.value.where == str(tmp_path / "b")
