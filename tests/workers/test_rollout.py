"""One rank that only samples: its copy of the policy, the weights it is sent, and an environment without deepspeed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.roles import GenerateRequest
from rlhf_dist.contracts.weights import Link, SyncInfo
from rlhf_dist.engines.process import Rank
from rlhf_dist.models.checksum import checksum
from rlhf_dist.rollout.vllm import VllmSettings
from rlhf_dist.workers import rollout as module
from rlhf_dist.workers.policy import PolicyWorker
from rlhf_dist.workers.rollout import RolloutWorker, cache_bytes_per_token, plain_section

ALONE = Rank(1, 2, 0, "cpu")
GROUP = {"rollout.ranks": 2, "placement.launcher": "ray"}
REQUEST = GenerateRequest("train", 0, 0, 0, 4, 2, version=3)
LEAN = """
import sys
for name in ("deepspeed", "tensorboard", "rich", "typer", "scipy", "plotly", "peft", "bitsandbytes"):
    sys.modules[name] = None  # importing it fails
from rlhf_dist.workers.roles import build_worker
import rlhf_dist.workers.ray_group, rlhf_dist.workers.rollout
"""


@pytest.fixture
def worker_of(configured: Any) -> Callable[..., RolloutWorker]:
    return lambda changes=None: RolloutWorker(configured(GROUP | (changes or {})), ALONE)


def weights(worker: RolloutWorker) -> dict[str, torch.Tensor]:
    return worker._target._weights  # type: ignore[attr-defined, no-any-return]


def sent(of: dict[str, torch.Tensor]) -> SyncInfo:
    return SyncInfo(checksum(of.items()), sum(weight.nbytes for weight in of.values()), 1)


def tokens(worker: Any, request: GenerateRequest = REQUEST) -> list[list[int]]:
    batch = worker.generate(request).payload
    return [row[mask].tolist() for row, mask in zip(batch.response_tokens_BT, batch.response_mask_BT, strict=True)]


def test_nothing_is_sampled_before_the_first_sync(worker_of: Callable[..., RolloutWorker]) -> None:
    with pytest.raises(UserError, match="holds -1") as caught:
        worker_of().generate(REQUEST)
    assert caught.value.where == "rollout rank 1, generate"


def test_weights_by_reference_make_it_sample_as_the_policy(worker_of: Any, configured: Any, plain_rank: Rank) -> None:
    """Weights far from those it was loaded with, so that they must have come."""
    policy = PolicyWorker(configured(), plain_rank)
    with torch.no_grad():
        for parameter in policy._engine.module.parameters():
            parameter.mul_(1.5)
    policy.sync_weights(3)
    worker = worker_of()
    while True:
        bucket = policy.next_weights(20_000)
        if bucket.info.done is not None:
            break
        assert worker.take_weights(bucket.payload) == bucket.info.bytes
    assert worker.hold_weights(3, bucket.info.done) == bucket.info.done
    assert tokens(worker) == tokens(policy)


def test_weights_over_a_link_make_it_sample_as_the_policy(worker_of: Any, configured: Any, plain_rank: Rank) -> None:
    """Two links at a time, in turns."""
    policy, worker = PolicyWorker(configured(GROUP), plain_rank), worker_of()
    links = [policy.open_link(Link(way, "gloo", "127.0.0.1", 0, 1, 20_000, 20.0)) for way in ("ipc", "broadcast")]  # type: ignore[arg-type]
    for version, link in enumerate((*links, *links)):
        with torch.no_grad():
            for parameter in policy._engine.module.parameters():
                parameter.mul_(1.1)
        worker._rank = Rank(0, 1, 0, "cpu")
        with ThreadPoolExecutor(1) as thread:
            receiving = thread.submit(worker.receive_weights, version, link)
            assert policy.send_weights(link) == receiving.result(20)
    own = dict(policy._engine.module.model.named_parameters())
    assert all(torch.equal(own[name], weight) for name, weight in weights(worker).items() if name in own)
    assert worker.generate(REQUEST).info.versions == (3,) * 8


def test_what_did_not_come_is_refused_and_nothing_is_sampled_with_it(worker_of: Callable[..., RolloutWorker]) -> None:
    worker = worker_of()
    all_of_them = {name: weight.clone() for name, weight in weights(worker).items()}
    worker.take_weights(all_of_them)
    worker.hold_weights(3, sent(all_of_them))
    first = next(iter(all_of_them))
    worker.take_weights({name: weight for name, weight in all_of_them.items() if name != first})
    with pytest.raises(UserError, match="lacks 1 of"):
        worker.hold_weights(4, sent(all_of_them))
    worker.take_weights(all_of_them)
    with pytest.raises(UserError, match="does not hold what the trainer sent"):
        worker.hold_weights(4, SyncInfo(1, 1, 1))
    with pytest.raises(UserError, match="no weight called x"):
        worker.take_weights({"x": torch.zeros(1)})
    with pytest.raises(UserError, match="asked for samples of policy version 3"):
        worker.generate(REQUEST)  # the weights are a mixture


def test_adapters_and_four_bits_are_not_its_business(configured: Any, worker_of: Any, wide_model: Path) -> None:
    policy = {"model": str(wide_model), "quantize": "nf4", "lora": {"r": 2}, "dtype": "bf16"}
    section = plain_section(configured(GROUP | {"policy": policy}))
    assert (section.quantize, section.dtype) == ("none", "bf16")
    assert all("lora" not in name and weight.dtype == torch.bfloat16 for name, weight in weights(worker_of({"policy": policy})).items())


def test_vllm_gets_the_settings_of_the_run_and_takes_the_weights_itself(worker_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for every slot at its longest, and no more."""
    built: list[VllmSettings] = []

    class Vllm:
        def __init__(self, settings: VllmSettings, *, decode: Any) -> None:
            built.append(settings)

    monkeypatch.setattr(module, "VllmEngine", Vllm)
    changes = {"rollout.engine": "vllm", "rollout.slots": 4000, "data.max_prompt_tokens": 60, "rollout.max_new_tokens": 40}
    worker = worker_of(changes)
    assert isinstance(worker._target, Vllm) and worker._sampler._sampler._engine is worker._target
    assert (built[0].max_model_len, built[0].slots, built[0].dtype) == (100, 4000, "fp32")
    assert built[0].kv_cache_gib == pytest.approx(
        4000 * 228 * (2 * 2 * 2 * 8 * 4) / 2**30
    )  # 2 layers, 2 heads of 8 numbers, keys and values
    worker_of(changes | {"rollout.slots": 1})
    assert built[1].kv_cache_gib == module.LEAST_CACHE_GIB


def test_the_cache_is_that_of_grouped_heads() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=3, head_dim=16)
    assert cache_bytes_per_token(config, torch.bfloat16) == 2 * 3 * 2 * 16 * 2


@pytest.mark.slow
def test_another_environment_needs_no_deepspeed() -> None:
    done = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
