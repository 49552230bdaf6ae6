"""What a worker keeps on its device for the coming phase, and that its calls bring back the rest, bit for bit."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_dist.contracts.roles import GenerateRequest, Needs, RestInfo
from rlhf_dist.engines.offload import weight_storages
from rlhf_dist.engines.process import Rank
from rlhf_dist.workers.policy import PolicyWorker
from rlhf_dist.workers.resting import STAYS, RestingModel, SleepingVllm, rest_engine
from rlhf_dist.workers.reward import RewardWorker
from rlhf_dist.workers.roles import build_worker
from rlhf_dist.workers.rollout import RolloutWorker

REQUEST = GenerateRequest("train", 0, 0, 0, 4, 1, 0)


def bytes_in(module: torch.nn.Module) -> int:
    return sum(storage.nbytes() for storage in weight_storages(module).values())


@pytest.mark.parametrize("needs", ["nothing", "sampler", "weights", "sync", "training"])
def test_an_engine_keeps_what_is_needed(needs: Needs, configured, plain_rank) -> None:
    engine = build_worker("value", configured(), plain_rank)._engine
    rested = rest_engine(engine, needs)
    assert (rested.weights > 0) == (needs == "nothing") and rested.stays == ""
    assert (bytes_in(engine.module) > 10_000) == (needs != "nothing")


def test_a_mapped_model_has_memory_of_its_own_and_rests(tiny_model) -> None:
    """`from_pretrained` maps a folder in the model's own precision: such memory cannot be emptied."""
    plain, model = (AutoModelForCausalLM.from_pretrained(tiny_model) for _ in range(2))
    size, resting = bytes_in(plain), RestingModel(model)
    resting.rest()
    assert resting.resting.weights > 0.9 * size > 9 * bytes_in(model)
    resting.wake()
    assert all(torch.equal(mine, other) for mine, other in zip(model.parameters(), plain.parameters(), strict=True))
    assert resting.resting.weights == 0 and resting.resting.seconds > 0


def test_two_models_of_a_rank_add_up() -> None:
    assert RestInfo(1, 2, 3.0) + RestInfo(10, 20, 30.0, "why") == RestInfo(11, 22, 33.0, "why")


@pytest.mark.parametrize("changes", [{}, {"policy.lora": {"r": 2}}], ids=["whole", "adapter"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_policy_samples_and_syncs_after_any_rest(stage, changes, configured, zero, plain_rank) -> None:
    """Under ZeRO 3 a copy samples; then the engine's weights are away meanwhile, and the copy's while it scores."""
    base = {"policy.deepspeed": zero(stage), "algorithm.estimator": "reinforce"}
    worker = PolicyWorker(configured(base | changes), plain_rank)
    first = worker.sync_weights(0)
    sampled = worker.generate(REQUEST).payload
    scores = worker.score(sampled).payload.tensors["old_logprobs_BT"]
    for needs in ("nothing", "sampler", "weights", "sync", "training"):
        assert worker.sync_weights(0) == first  # which needs all weights
        rested = worker.rest(needs)
        away = [bytes_in(model) < 10_000 for model in (worker._engine.module, *([worker._copy.model] if worker._copy else []))]
        wanted = {"nothing": [True, True], "sampler": [stage == 3, False], "weights": [False, True], "training": [False, True]}
        assert away == wanted.get(needs, [False, False])[: len(away)] and (rested.weights > 0) == any(away)
        assert torch.equal(worker.generate(REQUEST).payload.response_tokens_BT, sampled.response_tokens_BT)
        assert torch.equal(worker.score(sampled).payload.tensors["old_logprobs_BT"], scores)


def test_a_rollout_rank_wakes_for_samples_and_for_weights(configured, plain_rank) -> None:
    config = configured({"rollout.ranks": 1, "placement.launcher": "ray", "algorithm.estimator": "reinforce"})
    policy, worker = PolicyWorker(config, plain_rank), RolloutWorker(config, Rank(0, 1, 0, "cpu"))
    assert worker.rest("sync").weights == 0 < worker.rest("nothing").weights
    while (exported := policy.next_weights(20_000)).info.done is None:
        worker.take_weights(exported.payload)
        worker.rest("nothing")
    worker._weights.wake()
    worker.hold_weights(0, exported.info.done)
    before = worker.generate(REQUEST).payload.response_tokens_BT
    assert worker.rest("nothing").weights > 0 and torch.equal(worker.generate(REQUEST).payload.response_tokens_BT, before)


def test_several_rewards_take_turns_among_themselves(configured, plain_rank, tiny_scorer, shard_of, ragged) -> None:
    sources = [{"name": name, "kind": "model", "model": str(tiny_scorer)} for name in ("one", "other")]
    stays, leaves = (
        RewardWorker(configured({"reward.sources": sources, "placement.offload": offload}), plain_rank) for offload in ("none", "idle")
    )
    shard = shard_of(ragged)
    assert [result.values for result in leaves.judge(shard).results] == [result.values for result in stays.judge(shard).results]
    assert [engine.resting.weights > 0 for engine in leaves._engines.values()] == [True, True]
    assert [engine.resting.weights > 0 for engine in stays._engines.values()] == [False, False]
    assert leaves.rest("nothing").weights == stays.rest("nothing").weights > 0


def test_functions_have_nothing_to_put_away(configured, plain_rank) -> None:
    assert RewardWorker(configured(), plain_rank).rest("nothing") == RestInfo()


def test_models_leave_as_soon_as_they_are_loaded(configured, plain_rank) -> None:
    for role in ("policy", "reference", "value"):
        away = [build_worker(role, configured({"placement.offload": way}), plain_rank)._engine.resting.weights for way in ("none", "idle")]
        assert away[0] == 0 < away[1]


class Vllm:
    """Stands for `rollout.vllm.VllmEngine`."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def sleep(self) -> None:
        self.calls.append("sleep")

    def wake(self) -> None:
        self.calls.append("wake")


def test_vllm_sleeps_where_it_can_and_otherwise_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter((100, 350, 100, 300))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(free), 1000))
    engine: Any = Vllm()
    sleeping = SleepingVllm(engine, sleeps=True)
    sleeping.rest()
    sleeping.rest()
    assert (sleeping.resting.weights, sleeping.resting.stays) == (250, "")
    sleeping.wake()
    sleeping.wake()
    assert engine.calls == ["sleep", "wake"] and sleeping.resting.weights == 0 and sleeping.resting.seconds > 0
    awake = SleepingVllm(Vllm(), sleeps=False)  # type: ignore[arg-type]
    awake.rest()
    awake.wake()
    assert awake._engine.calls == [] and awake.resting == RestInfo(stays=STAYS)  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_idle_worker_leaves_its_gpu(configured, plain_rank, shard_of, ragged) -> None:
    before = torch.cuda.memory_allocated()
    worker, shard = build_worker("reference", configured({"placement.offload": "idle"}), plain_rank), shard_of(ragged)
    weights = worker._engine.resting.weights
    for _ in range(2):
        assert torch.cuda.memory_allocated() - before < weights / 2
        worker.score(shard)
        assert torch.cuda.memory_allocated() - before > 0.9 * weights
        worker.rest("nothing")
