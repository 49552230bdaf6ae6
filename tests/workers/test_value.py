"""One rank of the value model: values of a shard, steps towards the returns, an export that loads as a classifier."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from rlhf_dist.contracts.experience import merge_pieces
from rlhf_dist.contracts.moments import Moments
from rlhf_dist.contracts.roles import UpdateRequest
from rlhf_dist.workers.value import ValueWorker


def values_of(worker: ValueWorker, shard):
    return merge_pieces(shard, [worker.score(shard).payload])


@pytest.mark.parametrize("stage", [0, 3])
def test_values_start_at_zero_and_learn_the_returns(stage, configured, zero, plain_rank, shard_of, ragged) -> None:
    worker = ValueWorker(configured({"value.deepspeed": zero(stage), "value.optim": {"lr": 0.02, "schedule": "constant"}}), plain_rank)
    shard = shard_of(ragged)
    scored = values_of(worker, shard)
    mask = shard.response_mask_BT
    assert not scored.values_BT[mask].any() and not scored.bootstrap_value_B.any()
    returns = torch.where(mask, torch.tensor([[0.3], [-0.2], [0.5], [0.1], [0.4], [-0.1], [0.2]]), torch.nan)
    rows, denominator = tuple(range(7)), float(mask.sum())
    losses = []
    for _ in range(25):
        worker.load_experience([values_of(worker, shard).replace(returns_BT=returns)], Moments())
        info = worker.update(UpdateRequest((rows[:4], rows[4:]), denominator))
        losses.append(info.tally.means()["loss/value_avg"])
    assert losses[0] == pytest.approx(float(0.5 * returns[mask].square().mean()), rel=1e-5) and losses[-1] < losses[0] / 5
    assert info.step.lr == 0.02
    scored = values_of(worker, shard)
    assert scored.bootstrap_value_B.any() and (scored.values_BT[mask] - returns[mask]).abs().mean() < 0.2


@pytest.mark.parametrize("stage", [0, 3])
def test_packed_rows_score_and_train_as_padded_ones(stage, configured, zero, plain_rank, shard_of, ragged) -> None:
    """Over two steps, the first of which moves a head that started at zero."""
    shard, seen = shard_of(ragged), []
    for packing in (False, True):
        given = {"packing": packing, "deepspeed": zero(stage), "optim": {"lr": 0.02}, "microbatch_tokens": 30}
        worker = ValueWorker(configured({"value": given}), plain_rank)
        for _ in range(2):
            scored = values_of(worker, shard)
            worker.load_experience([scored.replace(returns_BT=torch.ones(shard.response_mask_BT.shape))], Moments())
            info = worker.update(UpdateRequest(((0, 1, 2), (3, 4, 5, 6)), 22.0))
        seen.append(
            [*values_of(worker, shard).values_BT[shard.response_mask_BT].tolist(), *scored.bootstrap_value_B.tolist(), info.step.grad_norm]
        )
    assert seen[1] == pytest.approx(seen[0], rel=1e-3, abs=1e-4) and any(seen[0])


def test_costs_and_speed_are_those_of_the_value_model(configured, zero, plain_rank, shard_of, ragged) -> None:
    workers = [ValueWorker(configured({"value.deepspeed": zero(stage)}), plain_rank) for stage in (0, 3)]
    one, other = (worker.costs() for worker in workers)
    assert one == other and one.head == 0, "sharded weights are counted whole"
    shard = shard_of(ragged)
    answer = workers[0].score(shard)
    done = sum(one.forward(len(p) + len(r)) for p, r in ragged) / 1e12
    assert answer.info.tally.means() == {"perf/value_score_tflops": pytest.approx(done / answer.info.seconds)}
    workers[0].load_experience(
        [merge_pieces(shard, [answer.payload]).replace(returns_BT=torch.ones(shard.response_mask_BT.shape))], Moments()
    )
    info = workers[0].update(UpdateRequest((tuple(range(7)),), 22.0))
    assert info.tally.means()["perf/value_update_tflops"] == pytest.approx(3 * done / info.seconds)


def test_an_export_answers_as_the_worker_and_starts_another_run(configured, plain_rank, shard_of, ragged, tmp_path) -> None:
    worker = ValueWorker(configured({"value.optim": {"lr": 0.02}}), plain_rank)
    shard = shard_of(ragged)
    returns = torch.ones(shard.response_mask_BT.shape)
    worker.load_experience([values_of(worker, shard).replace(returns_BT=returns)], Moments())
    for _ in range(3):
        worker.update(UpdateRequest((tuple(range(7)),), 20.0))
    want = values_of(worker, shard)
    worker.export(str(tmp_path / "value"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "value")
    got = torch.cat([model(input_ids=torch.tensor([prompt + response])).logits[0] for prompt, response in ragged]).detach()
    torch.testing.assert_close(got, want.bootstrap_value_B, rtol=1e-5, atol=1e-5)
    again = ValueWorker(configured({"value.model": str(tmp_path / "value"), "value.head_init": "keep"}), plain_rank)
    torch.testing.assert_close(values_of(again, shard).values_BT, want.values_BT, rtol=1e-5, atol=1e-5)


def test_the_value_loss_is_clipped_around_the_old_values(configured, plain_rank, shard_of, ragged) -> None:
    worker = ValueWorker(configured({"algorithm.value_clip": 0.01}), plain_rank)
    shard = shard_of(ragged)
    far = shard.replace(values_BT=torch.full(shard.response_mask_BT.shape, -1.0), returns_BT=torch.ones(shard.response_mask_BT.shape))
    worker.load_experience([far], Moments())
    assert worker.update(UpdateRequest((tuple(range(7)),), 20.0)).tally.means()["val/clipfrac_avg"] == 1.0


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("stage", [0, 3])
def test_adapters_and_the_head_learn_the_returns(
    stage, quantize, configured, zero, plain_rank, shard_of, ragged, wide_model, tmp_path
) -> None:
    """The export answers as the worker does, and peft loads the adapter with its head."""
    optim = {"lr": 0.02, "schedule": "constant"}
    given = {"model": str(wide_model), "lora": {"r": 4}, "quantize": quantize, "deepspeed": zero(stage), "optim": optim}
    worker = ValueWorker(configured({"value": given}), plain_rank)
    shard = shard_of(ragged)
    returns = torch.ones(shard.response_mask_BT.shape)
    losses = []
    for _ in range(10):
        worker.load_experience([values_of(worker, shard).replace(returns_BT=returns)], Moments())
        losses.append(worker.update(UpdateRequest((tuple(range(7)),), 22.0)).tally.means()["loss/value_avg"])
    assert losses[0] == pytest.approx(0.5) and losses[-1] < 0.1
    want = values_of(worker, shard).bootstrap_value_B
    worker.export(str(tmp_path / "value"))
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "value")
    models = [merged]
    if quantize == "none":
        base = AutoModelForSequenceClassification.from_pretrained(wide_model, num_labels=1)
        models.append(PeftModel.from_pretrained(base, str(tmp_path / "value" / "adapter")))
    for model in models:
        got = torch.cat([model.eval()(input_ids=torch.tensor([prompt + response])).logits[0] for prompt, response in ragged])
        torch.testing.assert_close(got.detach(), want, rtol=1e-5, atol=1e-5)
