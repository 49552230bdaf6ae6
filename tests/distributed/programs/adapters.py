"""One rank: full, LoRA and QLoRA training of policy, value and reward model over the ZeRO stages; saves checkpoints, rank 0 the exports.

One rank alone trains at ZeRO 0: what the others are held against.

usage: adapters.py MODEL OUT    prints {case: gradient norms}; writes OUT/<case>/ (checkpoint), OUT/<case>.pt (exported weights) and, of
some cases, OUT/deepspeed/<case>/ (DeepSpeed's own checkpoint)
"""

import json
import os
import sys
from pathlib import Path

import torch

from rlhf_dist.config.deepspeed import resolve_deepspeed
from rlhf_dist.config.engines import EngineSection, LoraSection
from rlhf_dist.config.optim import OptimSection
from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.contracts.tally import Tally
from rlhf_dist.engines.deepspeed import DeepSpeedEngine, Training
from rlhf_dist.engines.process import start_process_group, stop_process_group
from rlhf_dist.models.loading import load_causal_lm, load_token_scorer
from rlhf_dist.models.lora import add_adapter
from rlhf_dist.models.policy import PolicyModule
from rlhf_dist.models.reward_model import load_reward_model
from rlhf_dist.models.saving import write_origin
from rlhf_dist.models.value import ValueModule

STAGES = {"full": range(4), "qlora": range(4), "lora": (0, 2), "value": (0, 3), "reward": (0, 3)}
CASES = [(kind, "fp32", stage) for kind, stages in STAGES.items() for stage in stages]
HALF = [("full", "bf16", 2), ("qlora", "bf16", 3)]
DEEPSPEEDS = [*(f"full_fp32_zero{stage}" for stage in range(4)), "full_bf16_zero2", "lora_fp32_zero2", "qlora_fp32_zero0"]
ROWS = 6


def batch() -> SequenceBatch:
    """Ragged rows."""
    draw = torch.Generator().manual_seed(0)
    prompts, responses = torch.randint(1, 4, (2, ROWS, 1), generator=draw)
    mask_BT = torch.arange(3) < responses
    tokens = [torch.randint(3, 60, (ROWS, 3), generator=draw) for _ in range(2)]
    return SequenceBatch(tokens[0], torch.arange(3) >= 3 - prompts, tokens[1], mask_BT, mask_BT.clone())


def objective(outputs: dict, microbatch: SequenceBatch) -> tuple:
    """Negative log-likelihood of the response, or squared distance of the values from 1."""
    loss = -outputs["logprobs_BT"] if "logprobs_BT" in outputs else (outputs["values_BT"] - 1).square()
    return torch.where(microbatch.response_mask_BT, loss, 0.0).sum(), Tally()


def module(kind: str, dtype: str, model: str) -> object:
    section = EngineSection(dtype=dtype, quantize="nf4" if kind in ("qlora", "value") else "none")
    if kind == "value":
        return ValueModule(add_adapter(load_token_scorer(section, model, zero_head=True), LoraSection(r=2), 1, head="score"))
    if kind == "reward":  # read as a value model is: with a row added for its pad, and with adapted embeddings
        lora = LoraSection(r=2, target_modules=["embed_tokens", "q_proj"])
        return ValueModule(add_adapter(load_reward_model(section, model, 64, 1), lora, 1, head="score"))
    loaded = load_causal_lm(section, model)
    return PolicyModule(loaded if kind == "full" else add_adapter(loaded, LoraSection(r=2), 1))


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    rank = start_process_group(
        int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 0, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    )
    norms = {}
    for kind, dtype, stage in CASES + HALF if rank.world_size > 1 else [case for case in CASES if case[2] == 0]:
        case = f"{kind}_{dtype}_zero{stage}"
        path = out / f"zero{stage}_rank{rank.rank}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        config = resolve_deepspeed(str(path), dtype=dtype, clip_norm=1.0, trains=True)
        training = Training(OptimSection(lr=0.01, schedule="constant"), 10)
        engine = DeepSpeedEngine(module(kind, dtype, model), config, rank, training)
        whole = batch()
        mine = whole.select(list(range(rank.rank, ROWS, rank.world_size)))
        norms[case] = []
        for _ in range(3):
            engine.forward_backward([mine], objective, float(whole.response_mask_BT.sum()))
            norms[case].append(engine.optimizer_step().grad_norm)
        engine.begin_save(out / case)
        engine.saved(wait=True)
        if case in DEEPSPEEDS:
            folder = out / "deepspeed" / case
            engine._engine.save_checkpoint(str(folder), tag="engine", save_latest=False, exclude_frozen_parameters=kind != "full")
            if rank.rank == 0:
                write_origin(engine.module.model, folder)
        exported = {name: weight for bucket in engine.export_weights() for name, weight in bucket.items()}
        if rank.rank == 0:
            torch.save(exported, out / f"{case}.pt")
    stop_process_group()
    print(json.dumps(norms))


main()
