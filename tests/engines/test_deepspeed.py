"""The DeepSpeed engine on one rank against plain torch: gradients, steps, exports and checkpoints at every ZeRO stage."""

import copy
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_dist.algos.schedules import lr_factor
from rlhf_dist.config.deepspeed import resolve_deepspeed
from rlhf_dist.config.engines import LoraSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.optim import OptimSection
from rlhf_dist.contracts.engine import Outputs, SavedFile, StepInfo
from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.engines import deepspeed
from rlhf_dist.engines.deepspeed import DeepSpeedEngine, Training
from rlhf_dist.engines.fragments import fragments
from rlhf_dist.engines.offload import weight_storages
from rlhf_dist.engines.process import Rank
from rlhf_dist.engines.state_files import write_pieces
from rlhf_dist.models.logprobs import HeadOptions
from rlhf_dist.models.lora import add_adapter, named_weights
from rlhf_dist.models.policy import PolicyModule
from rlhf_dist.models.quantisation import quantise

STAGES = (0, 1, 2, 3)
DENOMINATOR = 7.0
AS_IF_SGD = OptimSection(lr=1e7, betas=(0.0, 0.0), eps=1e7, clip_norm=0, schedule="constant")
"""w ← w − lr · g / (|g| + eps): with lr = eps ≫ |g| a step takes exactly the gradient off the weights."""


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**size, max_position_embeddings=32, initializer_range=0.3, **options)).eval()


def batch(seed: int = 0, rows: int = 6) -> SequenceBatch:
    """Ragged rows."""
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = torch.randint(1, 4, (2, rows, 1), generator=generator)
    mask_BT = torch.arange(3) < responses
    return SequenceBatch(
        torch.randint(40, (rows, 3), generator=generator),
        torch.arange(3) >= 3 - prompts,
        torch.randint(40, (rows, 3), generator=generator),
        mask_BT,
        mask_BT.clone(),
    )


def objective(outputs: Outputs, microbatch: SequenceBatch) -> tuple[Tensor, Tally]:
    """Summed negative log-likelihood."""
    loss = -torch.where(microbatch.response_mask_BT, outputs["logprobs_BT"], 0.0).sum()
    tally = Tally()
    tally.add("nll", float(loss.detach()), float(microbatch.response_mask_BT.sum()))
    return loss, tally


@pytest.fixture
def engine_of(plain_rank: Rank, tmp_path: Path) -> Iterator[Callable[..., DeepSpeedEngine]]:
    """`engine_of(stage, model, optim, dtype, head)`; without optim an engine that only runs forward."""

    def make(
        stage: int,
        model: nn.Module | None = None,
        optim: OptimSection | None = None,
        dtype: str = "fp32",
        head: HeadOptions | None = None,
        **zero: Any,
    ) -> DeepSpeedEngine:
        path = tmp_path / f"zero{stage}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage} | zero}))
        clip = optim.clip_norm if optim else 0.0
        config = resolve_deepspeed(str(path), dtype=dtype, clip_norm=clip, trains=optim is not None)  # type: ignore[arg-type]
        training = Training(optim, total_steps=5) if optim else None
        made.append(DeepSpeedEngine(PolicyModule(model or llama(), head), config, plain_rank, training))
        return made[-1]

    made: list[DeepSpeedEngine] = []
    yield make
    for engine in made:
        if engine.stage == 3:  # each would keep gigabytes of address space for its bucket, until no process can be started any more
            engine.close()


def exported(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    return {name: weight for bucket in engine.export_weights() for name, weight in bucket.items()}


def autograd(model: nn.Module, microbatches: Sequence[SequenceBatch]) -> dict[str, Tensor]:
    """Gradient of Σ loss / DENOMINATOR by plain torch, one row at a time in double precision."""
    twin = PolicyModule(copy.deepcopy(model).double())
    for microbatch in microbatches:
        for row in range(len(microbatch)):
            single = microbatch.select([row])
            (objective(twin(**twin.inputs(single)), single)[0] / DENOMINATOR).backward()
    return {name: parameter.grad for name, parameter in twin.model.named_parameters() if parameter.grad is not None}


def save(engine: DeepSpeedEngine, folder: Path) -> tuple[SavedFile, ...]:
    engine.begin_save(folder)
    files = engine.saved(wait=True)
    assert files is not None
    return files


def relative_gap(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert set(got) == set(want)
    difference = sum(float((got[name].double() - want[name].double()).square().sum()) for name in want)
    return (difference / sum(float(x.double().square().sum()) for x in want.values())) ** 0.5


# --- gradients --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True], ids=["logits", "streamed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_takes_off_exactly_the_gradient_however_the_batch_is_cut(stage: int, tied: bool, streamed: bool, engine_of) -> None:
    """Σ loss / denominator, at every step anew: nothing of an earlier gradient is left over."""
    head = HeadOptions(logits_bytes=0) if streamed else HeadOptions()
    engine, whole = engine_of(stage, llama(tie_word_embeddings=tied), AS_IF_SGD, head=head), batch()
    cuts = [[range(6)], [[0], [1, 2], [3, 4, 5]], [[5, 1], [0, 2, 3, 4]], [[row] for row in range(6)]]
    for cut in cuts:
        before = exported(engine)
        current = llama(tie_word_embeddings=tied)
        missing, unexpected = current.load_state_dict(before, strict=False)
        assert missing == (["lm_head.weight"] if tied else []) and not unexpected
        want = autograd(current, [whole])
        tally = engine.forward_backward([whole.select(list(rows)) for rows in cut], objective, DENOMINATOR)
        step = engine.optimizer_step()
        after = exported(engine)
        assert relative_gap({name: before[name] - after[name] for name in before}, want) < 2e-6
        norm = sum(float(gradient.square().sum()) for gradient in want.values()) ** 0.5
        assert step.grad_norm == pytest.approx(norm, rel=1e-6) and step.lr == AS_IF_SGD.lr and not step.skipped
        assert tally.weights == {"nll": float(whole.valid_tokens_B.sum())}


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_without_rows_contributes_zero_and_still_steps(stage: int, engine_of) -> None:
    engine = engine_of(stage, optim=AS_IF_SGD)
    before = exported(engine)
    assert engine.forward_backward([], objective, DENOMINATOR).sums == {}
    assert engine.optimizer_step().grad_norm == 0.0
    after = exported(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("stage", STAGES)
def test_three_steps_of_adamw_with_clipping_and_schedule_are_torchs_own(stage: int, engine_of) -> None:
    optim = OptimSection(lr=3e-3, eps=1e-5, betas=(0.9, 0.95), weight_decay=0.1, clip_norm=0.5, warmup_steps=1, schedule="linear")
    engine, twin = engine_of(stage, optim=optim), PolicyModule(llama())
    adamw = torch.optim.AdamW(twin.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
    for number in range(3):
        whole = batch(number)
        engine.forward([whole])
        engine.forward_backward([whole.select([0, 1, 2]), whole.select([3, 4, 5])], objective, DENOMINATOR)
        step = engine.optimizer_step()
        for group in adamw.param_groups:
            group["lr"] = optim.lr * lr_factor(number, 5, 1, "linear")
        (objective(twin(**twin.inputs(whole)), whole)[0] / DENOMINATOR).backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), optim.clip_norm)
        adamw.step()
        adamw.zero_grad()
        assert step.grad_norm == pytest.approx(float(norm), rel=2e-5) and float(norm) > optim.clip_norm
        assert step.lr == adamw.param_groups[0]["lr"]
    got, want = exported(engine), dict(twin.model.named_parameters())
    assert all(torch.allclose(got[name], want[name], rtol=1e-4, atol=1e-5) for name in want)
    moved = relative_gap(got, {name: weight.detach() for name, weight in llama().named_parameters()})
    assert relative_gap(got, {name: weight.detach() for name, weight in want.items()}) < 1e-4 * moved


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(stage: int, engine_of) -> None:
    gradients, calls = [], []
    for checkpointed in (False, True):
        model, seen = llama(attention_dropout=0.0), []
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        engine = engine_of(stage, model, AS_IF_SGD)
        before = exported(engine)
        seen.clear()
        engine.forward_backward([batch()], objective, DENOMINATOR)
        assert not engine.module.training
        engine.optimizer_step()
        gradients.append({name: before[name] - weight for name, weight in exported(engine).items()})
        calls.append(len(seen))
    assert calls == [1, 2]
    assert relative_gap(gradients[1], gradients[0]) < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_trains_on_fp32_master_weights(stage: int, engine_of) -> None:
    """A step far below the spacing of bf16 adds up over many steps, and is lost without master weights."""
    engine = engine_of(stage, llama().bfloat16(), OptimSection(lr=5e-5, schedule="constant"), dtype="bf16")
    before = exported(engine)
    losses = []
    for _ in range(20):
        losses.append(engine.forward_backward([batch()], objective, DENOMINATOR).means()["nll"])
        step = engine.optimizer_step()
    after = exported(engine)
    assert all(weight.dtype == torch.bfloat16 for weight in after.values())
    assert losses[-1] < losses[0] and torch.isfinite(torch.tensor(step.grad_norm)) and step.grad_norm > 0
    assert any(not torch.equal(before[name], after[name]) for name in before)
    large = after["model.norm.weight"] != before["model.norm.weight"]  # ones, with a spacing of 2⁻⁸ below: 20 steps add up to 0.001
    assert not large.any()
    for _ in range(60):
        engine.forward_backward([batch()], objective, DENOMINATOR)
        engine.optimizer_step()
    assert (exported(engine)["model.norm.weight"] != before["model.norm.weight"]).any()


def test_fp16_on_a_cpu_is_refused_before_deepspeed_does(engine_of) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, where fp16 works")
    with pytest.raises(UserError, match="fp16 on a CPU"):
        engine_of(1, optim=OptimSection(), dtype="fp16")


# --- forward ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", [None, AS_IF_SGD], ids=["forward only", "trained"])
@pytest.mark.parametrize("stage", STAGES)
def test_forward_answers_each_microbatch_in_order_without_gradient(stage: int, optim, engine_of) -> None:
    engine, plain = engine_of(stage, optim=optim), PolicyModule(llama())
    microbatches = [batch(0), batch(1, rows=2), batch(2, rows=1)]
    outputs = engine.forward(microbatches)
    for output, microbatch in zip(outputs, microbatches, strict=True):
        want = plain(**plain.inputs(microbatch))
        assert set(output) == set(want)
        for name, tensor in output.items():
            assert not tensor.requires_grad and tensor.device.type == "cpu"
            torch.testing.assert_close(tensor, want[name].detach(), rtol=1e-6, atol=1e-6)
    assert engine.forward([]) == []


@pytest.mark.parametrize("stage", [0, 3])
def test_a_closed_engine_holds_no_weights_and_leaves_others_alone(stage: int, engine_of) -> None:
    engine, other = engine_of(stage), engine_of(stage, optim=AS_IF_SGD)
    want = other.forward([batch()])[0]["logprobs_BT"]
    assert torch.equal(engine.forward([batch()])[0]["logprobs_BT"], want)
    weights = list(engine.module.parameters())
    engine.close()
    engine.close()
    assert sum(held.numel() for weight in weights for held in (weight, getattr(weight, "ds_tensor", weight))) == 0
    assert torch.equal(other.forward([batch()])[0]["logprobs_BT"], want)


@pytest.mark.parametrize("stage", [0, 3])
def test_an_engine_without_training_settings_says_so(stage: int, engine_of, tmp_path) -> None:
    engine = engine_of(stage)
    asked = (
        lambda: engine.forward_backward([batch()], objective, 1.0),
        engine.optimizer_step,
        lambda: engine.begin_save(tmp_path),
        lambda: engine.load(tmp_path),
    )
    for call in asked:
        with pytest.raises(AssertionError, match="forward only"):
            call()
    assert set(exported(engine)) == set(dict(llama().named_parameters()))


# --- exports ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_an_export_is_the_models_state_in_bounded_buckets(stage: int, tied: bool, engine_of) -> None:
    model = llama(tie_word_embeddings=tied)
    model.register_buffer("scale", torch.tensor([2.0]))
    want = {name: weight.clone() for name, weight in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    buckets = list(engine_of(stage, model, AS_IF_SGD).export_weights(bucket_bytes=1500))
    got = {name: weight for bucket in buckets for name, weight in bucket.items()}
    assert sum(map(len, buckets)) == len(got) and set(got) == set(want)
    assert all(torch.equal(got[name], want[name]) for name in want)
    sizes = [sum(weight.nbytes for weight in bucket.values()) for bucket in buckets]
    assert len(buckets) > 3 and all(size <= 1500 or len(bucket) == 1 for size, bucket in zip(sizes, buckets, strict=True))
    assert any(len(bucket) > 1 for bucket in buckets) and any(size > 1500 for size in sizes)


def test_exported_weights_are_copies_that_later_steps_leave_alone(engine_of) -> None:
    engine = engine_of(0, optim=AS_IF_SGD)
    before = exported(engine)
    kept = {name: weight.clone() for name, weight in before.items()}
    engine.forward_backward([batch()], objective, DENOMINATOR)
    engine.optimizer_step()
    assert all(torch.equal(before[name], kept[name]) for name in kept)


# --- checkpoints ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_saved_goes_on_as_if_nothing_had_happened(stage: int, engine_of, tmp_path) -> None:
    """Weights, optimiser and schedule: two steps after a load equal the uninterrupted ones bit for bit."""
    optim = OptimSection(lr=3e-3, warmup_steps=1)

    def steps(engine: DeepSpeedEngine, seeds: Sequence[int]) -> list[float]:
        rates = []
        for seed in seeds:
            engine.forward_backward([batch(seed)], objective, DENOMINATOR)
            rates.append(engine.optimizer_step().lr)
        return rates

    engine = engine_of(stage, optim=optim)
    steps(engine, [0, 1])
    save(engine, tmp_path / "checkpoint")
    rates = steps(engine, [2, 3])
    other = engine_of(stage, LlamaForCausalLM(llama().config), optim)
    steps(other, [9])
    other.load(tmp_path / "checkpoint")
    assert steps(other, [2, 3]) == rates
    got, want = exported(other), exported(engine)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("stage", STAGES)
def test_training_goes_on_while_a_save_is_written(stage: int, engine_of, tmp_path, monkeypatch) -> None:
    """The writer is held back until two steps are taken; what it writes then is what was, and a second save waits for it."""
    go = threading.Event()
    monkeypatch.setattr(deepspeed, "write_pieces", lambda *arguments: (go.wait(20), write_pieces(*arguments))[1])
    engine = engine_of(stage, optim=OptimSection(lr=1e-2))
    engine.forward_backward([batch()], objective, DENOMINATOR)
    engine.optimizer_step()
    before = exported(engine)
    engine.begin_save(tmp_path / "first")
    for seed in (1, 2):
        engine.forward_backward([batch(seed)], objective, DENOMINATOR)
        engine.optimizer_step()
        assert engine.saved(wait=False) is None
    after = exported(engine)
    threading.Timer(0.2, go.set).start()
    engine.begin_save(tmp_path / "second")
    assert go.is_set() and (tmp_path / "first" / "rank_00000.safetensors").is_file()
    names = [file.name for file in engine.saved(wait=True) or ()]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "second").iterdir())
    for folder, want in (("first", before), ("second", after)):
        engine.load(tmp_path / folder)
        got = exported(engine)
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_save_that_does_not_fit_is_an_error_and_leaves_nothing(engine_of, tmp_path) -> None:
    engine = engine_of(0, optim=OptimSection())
    (tmp_path / "rank_00000.safetensors").symlink_to("/dev/full")
    engine.begin_save(tmp_path)
    with pytest.raises(UserError, match="the disk is full") as caught:
        engine.saved(wait=True)
    assert caught.value.where == str(tmp_path / "rank_00000.safetensors") and not list(tmp_path.glob("rank*"))
    assert len(save(engine, tmp_path / "elsewhere")) == 4


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_optimiser_state_in_host_memory_is_saved_and_checked_like_any_other(stage: int, engine_of, tmp_path) -> None:
    """DeepSpeed's own offload, which keeps gradients elsewhere too."""
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
    engine, other = (engine_of(stage, optim=OptimSection(lr=1e-2), **offload) for _ in range(2))

    def step(trained: DeepSpeedEngine, seed: int, factor: float = 1.0) -> StepInfo:
        trained.forward_backward([batch(seed)], lambda outputs, rows: (objective(outputs, rows)[0] * factor, Tally()), DENOMINATOR)
        return trained.optimizer_step()

    step(engine, 0)
    save(engine, tmp_path)
    assert step(engine, 1, math.inf).skipped
    want = step(engine, 2)
    for seed in (7, 8):
        step(other, seed)
    other.forward_backward([batch(9)], objective, DENOMINATOR)
    other.load(tmp_path)
    assert step(other, 2).grad_norm == want.grad_norm
    after = exported(engine)
    other.load(tmp_path)
    assert step(other, 1, math.nan).skipped and step(other, 2) == want
    got = exported(other)
    assert all(torch.equal(got[name], after[name]) for name in after)


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_loss_scale_goes_on_where_it_was_saved(stage: int, engine_of, tmp_path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: DeepSpeed refuses fp16 on a CPU")
    engine, other = (engine_of(stage, llama().half(), OptimSection(lr=1e-3), dtype="fp16") for _ in range(2))
    for _ in range(4):  # the first scales are too large for fp16
        engine.forward_backward([batch()], objective, DENOMINATOR)
        engine.optimizer_step()
    save(engine, tmp_path)
    other.load(tmp_path)
    infos = []
    for each in (engine, other):
        each.forward_backward([batch(1)], objective, DENOMINATOR)
        infos.append((each.optimizer_step(), each._engine.optimizer.loss_scale))
    assert infos[0] == infos[1]
    got, want = exported(other), exported(engine)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_is_not_stepped_on(stage: int, engine_of) -> None:
    """A step after it is the one that would have been taken without it; clipping off, so nothing looks at the norm for another reason."""
    optim = OptimSection(lr=1e-2, clip_norm=0, schedule="constant")
    steady, struck = engine_of(stage, optim=optim), engine_of(stage, optim=optim)
    for bad in (float("inf"), float("nan")):
        struck.forward_backward([batch()], lambda outputs, rows, bad=bad: (objective(outputs, rows)[0] * bad, Tally()), DENOMINATOR)
        step = struck.optimizer_step()
        assert step.skipped and not math.isfinite(step.grad_norm)
        infos = []
        for engine in (steady, struck):
            engine.forward_backward([batch(1)], objective, DENOMINATOR)
            infos.append(engine.optimizer_step())
        assert infos[0] == infos[1] and not infos[0].skipped
        want, got = exported(steady), exported(struck)
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_folder_without_a_checkpoint_is_named(stage: int, engine_of, tmp_path) -> None:
    with pytest.raises(UserError, match="no engine checkpoint") as caught:
        engine_of(stage, optim=AS_IF_SGD).load(tmp_path / "nothing")
    assert caught.value.where == str(tmp_path / "nothing")


# --- adapters ---------------------------------------------------------------------------------------------------------------------------


def held_in(bits: int) -> LlamaForCausalLM:
    if bits == 32:
        return llama()
    torch.manual_seed(0)
    wide = LlamaForCausalLM(LlamaConfig(**(llama().config.to_dict() | {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}))).eval()
    quantise(wide, torch.float32, "here")
    return wide


@pytest.mark.parametrize(("stage", "bits"), [*((stage, 32) for stage in STAGES), (0, 4), (3, 4)])
def test_an_adapter_trains_alone_and_comes_off_between_steps(stage: int, bits: int, engine_of) -> None:
    """Adapter off equals the base after every step; steps after that equal torch's own; the export is peft's merge."""
    optim = OptimSection(lr=0.02, schedule="constant", clip_norm=0)
    section = LoraSection(r=2, alpha=4.0)
    engine = engine_of(stage, add_adapter(held_in(bits), section, seed=1), optim)
    twin = PolicyModule(add_adapter(held_in(bits), section, seed=1))
    adamw = torch.optim.AdamW(
        [p for p in twin.parameters() if p.requires_grad], lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=0
    )
    base = PolicyModule(held_in(bits))
    want = base(**base.inputs(batch()))["logprobs_BT"]
    for seed in range(3):
        off = engine.forward([batch()], adapter=False)[0]["logprobs_BT"]
        assert torch.equal(off, want)
        engine.forward_backward([batch(seed)], objective, DENOMINATOR)
        step = engine.optimizer_step()
        (objective(twin(**twin.inputs(batch(seed))), batch(seed))[0] / DENOMINATOR).backward()
        norm = nn.utils.get_total_norm([p.grad for p in twin.parameters() if p.grad is not None])
        adamw.step()
        adamw.zero_grad()
        assert step.grad_norm == pytest.approx(float(norm), rel=1e-4)
    assert not torch.allclose(engine.forward([batch()])[0]["logprobs_BT"], want, atol=1e-2)
    got = exported(engine)
    if bits == 32:
        merged = dict(twin.model.merge_and_unload().named_parameters())
    else:  # peft's merge would quantise the sum again
        merged = {name: compute() for name, _, compute in named_weights(twin.model)}
    assert set(got) == set(merged)
    assert all(torch.allclose(got[name], merged[name], atol=1e-4) for name in merged)


@pytest.mark.parametrize(("stage", "bits"), [(0, 32), (0, 4), (2, 4), (3, 4)])
def test_a_checkpoint_of_adapters_holds_them_alone_and_goes_on(stage: int, bits: int, engine_of, tmp_path) -> None:
    """Frozen weights are those of the base model: a checkpoint without them is as exact, and as small as what is trained."""
    optim, section = OptimSection(lr=0.02), LoraSection(r=2)

    def step(engine: DeepSpeedEngine, seed: int) -> None:
        engine.forward_backward([batch(seed)], objective, DENOMINATOR)
        engine.optimizer_step()

    engine = engine_of(stage, add_adapter(held_in(bits), section, seed=1), optim)
    step(engine, 0)
    save(engine, tmp_path / "checkpoint")
    step(engine, 1)
    other = engine_of(stage, add_adapter(held_in(bits), section, seed=2), optim)
    other.load(tmp_path / "checkpoint")
    step(other, 1)
    got, want = exported(other), exported(engine)
    assert all(torch.equal(got[name], want[name]) for name in want)
    saved = load_file(tmp_path / "checkpoint" / "rank_00000.safetensors")
    assert saved and all(".lora_" in name for name in saved) and not (tmp_path / "checkpoint" / "buffers.safetensors").exists()
    with pytest.raises(UserError, match="trains other weights"):
        engine_of(stage, add_adapter(held_in(bits), LoraSection(r=2, target_modules=["q_proj"]), 1), optim).load(tmp_path / "checkpoint")


# --- rest -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_that_rested_goes_on_bit_for_bit(stage: int, dtype: str, engine_of) -> None:
    """Two engines take the same steps; one rests wherever it may."""
    optim, half = OptimSection(lr=1e-2), torch.float32 if dtype == "fp32" else torch.bfloat16
    steady, resting = (engine_of(stage, llama().to(half), optim, dtype) for _ in range(2))
    seen = []
    for engine in (steady, resting):
        trace = []
        for _ in range(3):
            engine.forward_backward([batch()], objective, DENOMINATOR)
            trace.append(engine.optimizer_step().grad_norm)
            if engine is resting:
                parameters = sum(p.numel() if stage < 3 else p.ds_tensor.numel() for p in engine.module.parameters())
                moments = engine.rest()
                assert moments >= 0.95 * 2 * parameters * 4, "both moments of AdamW at least; the smallest tensors stay"
                assert engine.rest(weights=True) >= moments + 0.95 * parameters * half.itemsize
                assert all(storage.nbytes() < 1024 for storage in weight_storages(engine.module).values())
            trace.append(engine.forward([batch()])[0]["logprobs_BT"])
        seen.append((trace, exported(engine)))
    (one, weights), (other, same) = seen
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True))
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_an_engine_that_only_runs_forward_rests_too(engine_of) -> None:
    engine = engine_of(0)
    before = engine.forward([batch()])[0]["logprobs_BT"]
    assert engine.rest() == 0 and engine.rest(weights=True) > 0
    assert torch.equal(engine.forward([batch()])[0]["logprobs_BT"], before)


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_is_not_stepped_on_though_its_gradient_is(stage: int, engine_of) -> None:
    engine = engine_of(stage, optim=OptimSection(lr=1e-2, schedule="constant"))
    before = exported(engine)
    for bad in (math.inf, math.nan):
        engine.forward_backward(
            [batch(), batch(1)], lambda outputs, rows, bad=bad: (objective(outputs, rows)[0] + bad, Tally()), DENOMINATOR
        )
        step = engine.optimizer_step()
        assert step.skipped and not step.overflow and engine.unsound_weights() == ""
    assert all(torch.equal(weight, before[name]) for name, weight in exported(engine).items())


@pytest.mark.parametrize("stage", STAGES)
def test_a_weight_that_is_not_finite_is_named(stage: int, engine_of) -> None:
    engine = engine_of(stage, optim=OptimSection(lr=1e-2))
    assert engine.unsound_weights() == "" and engine.any_rank(True) and not engine.any_rank(False)
    owned = fragments(engine.module, engine._engine.optimizer, stage)
    for bad in (math.nan, math.inf, -math.inf):
        owned[2].weight[-1] = bad
        assert engine.unsound_weights() == owned[2].name
        owned[2].weight[-1] = 0.0
    owned[0].weight[:2] = 3e38  # their sum overflows
    assert engine.unsound_weights() == ""


def test_the_end_of_the_loss_scale_is_said_in_words(engine_of, monkeypatch) -> None:
    engine = engine_of(0, optim=OptimSection(lr=1e-2))

    def ended(text: str) -> None:
        raise Exception(text)

    engine.forward_backward([batch()], objective, DENOMINATOR)
    monkeypatch.setattr(engine._engine, "step", lambda: ended("Current loss scale already at minimum - cannot decrease scale anymore."))
    with pytest.raises(UserError, match="overflows in fp16 even at the smallest loss scale"):
        engine.optimizer_step()
    monkeypatch.setattr(engine._engine, "step", lambda: ended("another"))
    with pytest.raises(Exception, match="another"):
        engine.optimizer_step()
