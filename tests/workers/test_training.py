"""What trained roles share: joining shards, whitening over the global batch, one step on this rank's rows, engines from config."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from rlhf_dist.algos.objectives import PolicyObjective
from rlhf_dist.algos.whitening import masked_moments, whiten
from rlhf_dist.config.algorithm import AlgorithmSection
from rlhf_dist.config.engines import LoraSection, PolicySection, ValueSection
from rlhf_dist.config.optim import OptimSection
from rlhf_dist.contracts.engine import StepInfo
from rlhf_dist.contracts.experience import ExperienceBatch
from rlhf_dist.contracts.moments import merged_moments
from rlhf_dist.contracts.roles import UpdateRequest
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.engines.deepspeed import Training
from rlhf_dist.models.flops import flops_of, training_flops
from rlhf_dist.models.loading import load_causal_lm
from rlhf_dist.models.lora import add_adapter
from rlhf_dist.models.policy import PolicyModule
from rlhf_dist.workers.training import Trainer, build_engine, optimizer_steps, prepare_checkpointing, seeded

SIZE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


class RecordingEngine:
    """Remembers what it was asked to train on."""

    rank, world_size = 0, 1
    module = PolicyModule(LlamaForCausalLM(LlamaConfig(**SIZE)))

    def __init__(self) -> None:
        self.calls: list[tuple[list[ExperienceBatch], float]] = []

    def forward_backward(self, microbatches: Any, objective: Any, denominator: float) -> Tally:
        self.calls.append((list(microbatches), denominator))
        tally = Tally()
        tally.add("rows", sum(map(len, microbatches)), 1)
        return tally

    def optimizer_step(self) -> StepInfo:
        return StepInfo(1.0, 0.1)

    def unsound_weights(self) -> str:
        return ""


@pytest.fixture
def shards(shard_of, ragged) -> list[ExperienceBatch]:
    """Two shards with advantages: garbage in padded slots."""
    whole = shard_of(ragged)
    advantages = torch.randn(whole.response_mask_BT.shape, generator=torch.Generator().manual_seed(3)) * 5 + 2
    whole = whole.replace(
        advantages_BT=torch.where(whole.response_mask_BT, advantages, torch.nan),
        old_logprobs_BT=torch.where(whole.response_mask_BT, -1.0, torch.nan),
    )
    return [whole.select([0, 1, 2]), whole.select([3, 4, 5, 6])]


def moments_of(shards: list[ExperienceBatch]) -> Any:
    return merged_moments(masked_moments(s.advantages_BT, s.response_mask_BT) for s in shards)


def test_shards_join_in_order_and_advantages_are_whitened_over_all_of_them(shards) -> None:
    engine = RecordingEngine()
    trainer = Trainer(engine, PolicyObjective(AlgorithmSection()), whitens=True)
    assert trainer.load(shards, moments_of(shards)) == 7
    trainer.update(UpdateRequest((tuple(range(7)),), 3.0))
    batch, mask = engine.calls[0][0][0], engine.calls[0][0][0].response_mask_BT
    assert batch.prompts == tuple(f"prompt {row}" for row in range(7))
    values = batch.advantages_BT[mask].double()
    assert float(values.mean()) == pytest.approx(0, abs=1e-6) and float(values.std()) == pytest.approx(1, abs=1e-5)
    joined = ExperienceBatch.concat(shards)
    assert torch.equal(batch.advantages_BT, whiten(joined.advantages_BT, joined.response_mask_BT, moments_of(shards)))


def test_advantages_stay_as_they_are_where_the_config_says_so(shards) -> None:
    engine = RecordingEngine()
    trainer = Trainer(engine, PolicyObjective(AlgorithmSection()), whitens=False)
    trainer.load(shards, moments_of(shards))
    trainer.update(UpdateRequest((tuple(range(7)),), 3.0))
    batch = engine.calls[0][0][0]
    assert torch.equal(batch.advantages_BT[batch.response_mask_BT], ExperienceBatch.concat(shards).advantages_BT[batch.response_mask_BT])


def test_an_update_trains_on_the_rows_it_names_and_skips_empty_microbatches(shards) -> None:
    engine = RecordingEngine()
    trainer = Trainer(engine, PolicyObjective(AlgorithmSection()), whitens=True)
    trainer.load(shards, moments_of(shards))
    info = trainer.update(UpdateRequest(((4, 1), (), (0,)), 5.5))
    (microbatches, denominator), = engine.calls  # fmt: skip
    assert [m.prompts for m in microbatches] == [("prompt 4", "prompt 1"), ("prompt 0",)] and denominator == 5.5
    speed = "perf/policy_update_tflops"
    assert info.tally.sums.keys() == {"rows", speed} and info.tally.sums["rows"] == 3.0
    assert info.step == StepInfo(1.0, 0.1) and info.tally.weights[speed] == info.seconds > 0
    costs = training_flops(engine.module)
    assert info.tally.sums[speed] == pytest.approx(flops_of(costs, microbatches) / 1e12, rel=1e-9)
    assert trainer.update(UpdateRequest((), 1.0)).tally.sums == {"rows": 0.0}  # a rank without rows still steps


def test_a_later_load_replaces_the_experience(shards) -> None:
    engine = RecordingEngine()
    trainer = Trainer(engine, PolicyObjective(AlgorithmSection()), whitens=False)
    trainer.load(shards, moments_of(shards))
    assert trainer.load(shards[1:], moments_of(shards[1:])) == 4
    trainer.update(UpdateRequest(((0,),), 1.0))
    assert engine.calls[0][0][0].prompts == ("prompt 3",)


def test_an_update_before_the_experience_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="load the experience first"):
        Trainer(RecordingEngine(), PolicyObjective(AlgorithmSection()), whitens=False).update(UpdateRequest((), 1.0))


def test_the_first_update_of_a_real_engine_shows_a_ratio_of_one(shards, tiny_model, plain_rank) -> None:
    section = PolicySection(model=str(tiny_model), optim=OptimSection(lr=1e-3))
    engine = build_engine(PolicyModule(load_causal_lm(section, section.model)), section, plain_rank, Training(section.optim, 10))
    joined = ExperienceBatch.concat(shards)
    old = engine.forward([joined])[0]["logprobs_BT"]
    trainer = Trainer(engine, PolicyObjective(AlgorithmSection()), whitens=True)
    trainer.load([joined.replace(old_logprobs_BT=old)], moments_of(shards))
    request = UpdateRequest(((0, 3), (1,), (2, 4, 5, 6)), float(joined.valid_tokens_B.sum()))
    first, second = trainer.update(request), trainer.update(request)
    assert first.tally.means()["val/ratio"] == pytest.approx(1, abs=1e-5) and first.tally.means()["policy/clipfrac_avg"] == 0
    assert first.tally.means()["loss/policy_avg"] == pytest.approx(0, abs=1e-5)  # −mean of whitened advantages
    assert abs(second.tally.means()["val/ratio"] - 1) > 1e-4 and second.tally.means()["loss/policy_avg"] < 0
    assert first.step.grad_norm > 0 and first.step.lr == 1e-3


@pytest.mark.parametrize(
    ("changes", "idle", "steps"),
    [({}, 0, 8), ({"run.steps": 5, "algorithm.epochs": 3, "algorithm.minibatches": 4}, 0, 60), ({"run.steps": 5}, 2, 12), ({}, 9, 4)],
)
def test_the_schedule_spans_the_optimizer_steps_of_the_run(changes, idle, steps, configured) -> None:
    assert optimizer_steps(configured(changes), idle) == steps


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["policy", "value"])
def test_activations_are_recomputed_where_the_config_asks_for_it(kind, lora, tiny_model) -> None:
    """With adapters too: their gradients are there although the inputs of the first layer need none."""

    def gradients(checkpointing: bool) -> tuple[dict[str, torch.Tensor], int]:
        torch.manual_seed(0)
        section = PolicySection(model=str(tiny_model), gradient_checkpointing=checkpointing)
        if kind == "value":
            section = ValueSection(gradient_checkpointing=checkpointing)
        auto = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
        model: Any = auto.from_pretrained(tiny_model, num_labels=1)
        if lora:
            model = add_adapter(model, LoraSection(r=2), seed=0) if kind == "policy" else model.requires_grad_(True)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.ones_(parameter)
        model, calls = prepare_checkpointing(model, section), []
        next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp")).register_forward_pre_hook(lambda *_: calls.append(1))
        model.train()
        model(input_ids=torch.arange(1, 7)[None]).logits.square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, len(calls)

    (plain, once), (recomputed, twice) = gradients(False), gradients(True)
    assert (once, twice) == (1, 2) and set(plain) == set(recomputed)
    assert all(torch.allclose(plain[n], recomputed[n], rtol=1e-4, atol=1e-5) for n in plain)


def test_an_engine_gets_its_deepspeed_file_its_clip_and_its_precision(tiny_model, plain_rank, tmp_path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}))
    section = PolicySection(model=str(tiny_model), deepspeed=str(path), dtype="bf16", optim=OptimSection(clip_norm=0.25))
    module = PolicyModule(load_causal_lm(section, section.model))
    engine = build_engine(module, section, plain_rank, Training(section.optim, 1))
    assert engine.stage == 2 and engine._engine.gradient_clipping() == 0.25 and engine._engine.bfloat16_enabled()
    assert build_engine(PolicyModule(load_causal_lm(section, section.model)), section, plain_rank).stage == 0  # nothing to shard


def test_a_seed_fixes_what_is_initialised_at_random() -> None:
    draws = []
    for seed in (1, 1, 2):
        seeded(seed)
        draws.append(torch.randn(3))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
