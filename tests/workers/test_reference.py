"""The reference: log-probs of the frozen initial policy, at the sampling temperature, on its own engine."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_dist.models.policy import PolicyModule
from rlhf_dist.workers.reference import ReferenceWorker


@pytest.mark.parametrize("stage", [0, 3])
def test_it_scores_as_the_initial_policy_alone_would(stage, configured, zero, plain_rank, shard_of, ragged, tiny_model) -> None:
    changes = {"reference.deepspeed": zero(stage), "rollout.temperature": 0.7, "reference.microbatch_tokens": 16}
    answer = ReferenceWorker(configured(changes), plain_rank).score(shard_of(ragged))
    scores, model = answer.payload.tensors["ref_logprobs_BT"], AutoModelForCausalLM.from_pretrained(tiny_model)
    for row, (prompt, response) in enumerate(ragged):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        want = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(scores[row, : len(response)], want.detach(), rtol=1e-5, atol=1e-5)
    assert answer.payload.rows == answer.info.rows == tuple(range(len(ragged))) and answer.info.seconds > 0


def test_packed_rows_score_as_padded_ones(configured, plain_rank, shard_of, ragged) -> None:
    shard = shard_of(ragged)
    padded, packed = (
        ReferenceWorker(configured({"reference.packing": packing, "reference.microbatch_tokens": 30}), plain_rank)
        for packing in (False, True)
    )
    mask = shard.response_mask_BT
    want, got = (worker.score(shard).payload.tensors["ref_logprobs_BT"][mask] for worker in (padded, packed))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert packed._engine.module.packing


def test_a_model_of_its_own_takes_the_policys_place(configured, plain_rank, shard_of, ragged, tiny_model, tmp_path) -> None:
    torch.manual_seed(9)
    other = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(tiny_model).config)
    other.save_pretrained(tmp_path)
    shard = shard_of(ragged)
    own, default = (
        ReferenceWorker(configured(changes), plain_rank).score(shard).payload.tensors["ref_logprobs_BT"]
        for changes in ({"reference.model": str(tmp_path)}, {})
    )
    assert not torch.allclose(own, default, atol=0.1)


def test_bf16_is_the_references_own_choice(configured, plain_rank, shard_of, ragged) -> None:
    worker = ReferenceWorker(configured({"reference.dtype": "bf16"}), plain_rank)
    scores = worker.score(shard_of(ragged)).payload.tensors["ref_logprobs_BT"]
    assert scores.dtype == torch.float32 and torch.isfinite(scores).all()


@pytest.mark.parametrize("stage", [0, 3])
def test_in_4_bits_it_scores_as_its_dequantised_weights_do(stage, configured, zero, plain_rank, shard_of, ragged, wide_model) -> None:
    changes = {"policy.model": str(wide_model), "reference.quantize": "nf4", "reference.deepspeed": zero(stage)}
    shard = shard_of(ragged)
    worker = ReferenceWorker(configured(changes), plain_rank)
    scores = worker.score(shard).payload.tensors["ref_logprobs_BT"]
    plain = AutoModelForCausalLM.from_pretrained(wide_model)
    plain.load_state_dict({name: weight for bucket in worker._engine.export_weights() for name, weight in bucket.items()})
    module = PolicyModule(plain.eval())
    with torch.no_grad():
        want = module(**module.inputs(shard))["logprobs_BT"]
    mask = shard.response_mask_BT
    torch.testing.assert_close(scores[mask], want[mask], rtol=1e-5, atol=1e-5)
