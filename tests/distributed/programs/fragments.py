"""One rank: engines over the ZeRO stages save, train on, are loaded into fresh engines and into themselves, and meet infinite gradients.

usage: fragments.py OUT [ALONE]    writes OUT/<case>/ (checkpoints); prints {case: {claim: whether it held}}
ALONE: where one rank left its checkpoints; they are loaded beside this run's own.
"""

import json
import math
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_dist.config.deepspeed import resolve_deepspeed
from rlhf_dist.config.engines import LoraSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.optim import OptimSection
from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.engines.deepspeed import DeepSpeedEngine, Training
from rlhf_dist.engines.fragments import fragments, host_pieces
from rlhf_dist.engines.process import Rank, start_process_group, stop_process_group
from rlhf_dist.engines.state_files import SavedState
from rlhf_dist.models.lora import add_adapter
from rlhf_dist.models.policy import PolicyModule

CASES = [*(("full", "fp32", stage) for stage in range(4)), ("full", "bf16", 2), ("full", "bf16", 3), ("lora", "fp32", 3)]
ALONE = [("full", "fp32", 0), ("full", "fp32", 3), ("full", "bf16", 2), ("lora", "fp32", 0)]
"""What one rank does; as many ranks do them all, and load what one rank saved."""
TARGETS = [("full", "fp32", 0), ("full", "fp32", 3), ("full", "bf16", 2), ("lora", "fp32", 3)]
ROWS = 6
UNSEEN = 39
"""A token of no batch: its row of the embeddings is -0.0 and has no gradient."""
OPTIM = OptimSection(lr=3e-3, eps=1e-5, warmup_steps=1, schedule="linear", clip_norm=1.0)


def model(kind: str, dtype: str, seed: int) -> torch.nn.Module:
    """Seven inputs and outputs: nothing divides by the ranks. Adapters of any seed stand on the same base."""
    base = 0 if kind == "lora" else seed
    torch.manual_seed(base)
    size = {"vocab_size": 40, "hidden_size": 14, "intermediate_size": 7, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = LlamaConfig(**size, max_position_embeddings=32, initializer_range=0.3)
    made = LlamaForCausalLM(config).eval().to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    made.register_buffer("scale", torch.tensor([2.0 + base]))
    with torch.no_grad():
        made.model.embed_tokens.weight[UNSEEN] = -0.0
    return add_adapter(made, LoraSection(r=3), seed) if kind == "lora" else made


def batch(seed: int) -> SequenceBatch:
    """Ragged rows."""
    draw = torch.Generator().manual_seed(seed)
    prompts, responses = torch.randint(1, 4, (2, ROWS, 1), generator=draw)
    mask_BT = torch.arange(3) < responses
    tokens = [torch.randint(3, UNSEEN, (ROWS, 3), generator=draw) for _ in range(2)]
    return SequenceBatch(tokens[0], torch.arange(3) >= 3 - prompts, tokens[1], mask_BT, mask_BT.clone())


def backward(engine: DeepSpeedEngine, seed: int, factor: float = 1.0) -> None:
    whole = batch(seed)
    mine = whole.select(list(range(engine.rank, ROWS, engine.world_size)))

    def objective(outputs: dict, microbatch: SequenceBatch) -> tuple:
        return -factor * torch.where(microbatch.response_mask_BT, outputs["logprobs_BT"], 0.0).sum(), Tally()

    engine.forward_backward([mine], objective, float(whole.response_mask_BT.sum()))


def steps(engine: DeepSpeedEngine, *seeds: int) -> list[float]:
    """Gradient norms and learning rates."""
    found = []
    for seed in seeds:
        backward(engine, seed)
        info = engine.optimizer_step()
        found += [info.grad_norm, info.lr]
    return found


def exported(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    return {name: weight for bucket in engine.export_weights() for name, weight in bucket.items()}


def everything(engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """This rank's fp32 weights, moments and step counts, and the model's weights."""
    held = exported(engine)
    optimizer = engine._engine.optimizer
    for piece in host_pieces(fragments(engine.module, optimizer, engine.stage), optimizer, engine.stage):
        held |= {f"{piece.name} {kind}": tensor for kind, tensor in piece.tensors.items()}
        held[f"{piece.name} step"] = torch.tensor(piece.step)
    return held


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit: 0.0 is not -0.0."""
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and torch.equal(one[name].view(bits[one[name].dtype]), other[name].view(bits[other[name].dtype]))
        for name in one
    )


def engine_of(case: tuple[str, str, int], rank: Rank, seed: int) -> DeepSpeedEngine:
    kind, dtype, stage = case
    path = Path(sys.argv[1]) / f"rank{rank.rank}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 20}}))
    config = resolve_deepspeed(str(path), dtype=dtype, clip_norm=1.0, trains=True)
    return DeepSpeedEngine(PolicyModule(model(kind, dtype, seed)), config, rank, Training(OPTIM, 20))


def claims(case: tuple[str, str, int], rank: Rank, out: Path) -> dict[str, bool]:
    """What must hold of one engine alone."""
    held = {}
    engine, folder = engine_of(case, rank, 0), out / name_of(case)
    steps(engine, 0, 1)
    at_save = everything(engine)
    engine.rest(weights=True)
    engine.begin_save(folder)
    norms = steps(engine, 2, 3)
    files = engine.saved(wait=True)
    held["saved files are there"] = all((folder / file.name).stat().st_size == file.bytes for file in files)
    want = everything(engine)

    fresh = engine_of(case, rank, 5)
    backward(fresh, 8)  # a gradient that nobody will use
    fresh.rest(weights=True)
    fresh.load(folder)
    held["loaded is what was saved"] = same(everything(fresh), at_save)
    held["resumed is uninterrupted"] = steps(fresh, 2, 3) == norms and same(everything(fresh), want)
    if case[0] == "full":
        held["-0.0 stays"] = bool(torch.signbit(exported(fresh)["model.embed_tokens.weight"][UNSEEN]).all())

    steps(engine, 4)
    backward(engine, 9)
    engine.load(folder)
    held["rolled back is uninterrupted"] = steps(engine, 2, 3) == norms and same(everything(engine), want)

    for number, factor in enumerate((math.inf, math.nan)):
        backward(engine, 4, factor if rank.rank == 0 else 1.0)
        info = engine.optimizer_step()
        held[f"{factor} changes nothing"] = info.skipped and not math.isfinite(info.grad_norm) and same(everything(engine), want)
        held[f"{factor} moves the schedule"] = info.lr == engine_lr(4 + number)
    last = steps(engine, 4)
    held["training goes on"] = math.isfinite(last[0]) and last[1] == engine_lr(6) and not same(everything(engine), want)
    fresh.load(folder)
    steps(fresh, 2, 3)
    fresh._steps_taken = 6
    held["a skipped step leaves no trace"] = steps(fresh, 4) == last and same(everything(fresh), everything(engine))
    if rank.rank == 0:
        save_file({name: weight for name, weight in at_save.items() if name.find(" ") < 0}, folder.with_suffix(".at_save"))
    fresh.load(folder)
    steps(fresh, 2)
    after = exported(fresh)
    if rank.rank == 0:
        save_file(after, folder.with_suffix(".next"))
    if engine.stage == 3:
        engine.close(), fresh.close()
    return held


def engine_lr(steps_taken: int) -> float:
    from rlhf_dist.algos.schedules import lr_factor

    return OPTIM.lr * lr_factor(steps_taken, 20, OPTIM.warmup_steps, OPTIM.schedule)


def crossings(case: tuple[str, str, int], rank: Rank, sources: list[Path]) -> dict[str, bool]:
    """Checkpoints of every stage, precision and number of ranks, into one engine of this case."""
    held = {}
    engine = engine_of(case, rank, 3)
    precision = torch.float32 if case[1] == "fp32" else torch.bfloat16
    for source in sources:
        engine.load(source)
        if case[0] == "full":
            want = {name.removeprefix("model."): weight.to(precision) for name, weight in SavedState(source).weights().items()}
            want["scale"] = want["scale"].float()
        else:
            want = load_file(source.with_suffix(".at_save"))
        label = f"{source.parent.name}/{source.name}"
        if case[0] == "full" or case[1] in source.name:
            held[f"{label} loaded"] = same(exported(engine), want)
        if case[1] in source.name:
            steps(engine, 2)
            got, after = exported(engine), load_file(source.with_suffix(".next"))
            near = 1e-6 if case[1] == "fp32" else 0.02
            held[f"{label} stepped"] = all(torch.allclose(got[name], after[name], rtol=near, atol=near) for name in after)
    try:
        engine.load(sources[0].parent / f"{'full' if case[0] == 'lora' else 'lora'}_fp32_zero3")
    except UserError as error:
        held["another model is refused"] = "trains other weights" in str(error)
    engine.close()
    return held


def name_of(case: tuple[str, str, int]) -> str:
    return "{}_{}_zero{}".format(*case)


def main() -> None:
    folders = [Path(path) for path in sys.argv[1:]]
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank = start_process_group(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 0, *address)
    held = {name_of(case): claims(case, rank, folders[0]) for case in (CASES if rank.world_size > 1 else ALONE)}
    saved = [folder / name_of(case) for folder, cases in zip(folders, (CASES, ALONE), strict=False) for case in cases]
    for case in TARGETS if rank.world_size > 1 else ():
        held[name_of(case)] |= crossings(case, rank, [path for path in saved if path.name.startswith(case[0])])
    stop_process_group()
    print(json.dumps(held))


main()
