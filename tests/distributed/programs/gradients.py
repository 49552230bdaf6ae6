"""One rank: gradients of the policy, value, DPO and reward-model losses of one batch, over ZeRO stages × numbers of microbatches, rows
padded or packed; rank 0 saves them.

usage: gradients.py MODEL OUT.pt
"""

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad
from reward_gradients import reward_gradients

from rlhf_dist.algos.dpo_objective import DPOObjective
from rlhf_dist.algos.objectives import PolicyObjective, ValueObjective
from rlhf_dist.config.algorithm import AlgorithmSection
from rlhf_dist.config.deepspeed import resolve_deepspeed
from rlhf_dist.config.dpo import DPOSection
from rlhf_dist.config.engines import PolicySection, ValueSection
from rlhf_dist.config.optim import OptimSection
from rlhf_dist.contracts.experience import ExperienceBatch, SequenceBatch
from rlhf_dist.contracts.pairs import PairBatch
from rlhf_dist.engines.deepspeed import DeepSpeedEngine, Training
from rlhf_dist.engines.process import start_process_group, stop_process_group
from rlhf_dist.models.loading import load_causal_lm, load_token_scorer
from rlhf_dist.models.policy import PolicyModule
from rlhf_dist.models.value import ValueModule

ROWS, P, T = 7, 6, 9


def experience(vocabulary: int) -> ExperienceBatch:
    """Ragged rows whose padded slots hold poison."""
    draw = torch.Generator().manual_seed(5)
    prompts, responses = torch.tensor([6, 1, 3, 5, 2, 6, 4]), torch.tensor([9, 4, 1, 7, 9, 2, 5])
    prompt_mask = torch.arange(P) >= P - prompts[:, None]
    mask = torch.arange(T) < responses[:, None]

    def numbers(scale: float) -> torch.Tensor:
        return torch.where(mask, torch.randn(ROWS, T, generator=draw) * scale, float("nan"))

    tokens = [torch.randint(3, vocabulary, shape, generator=draw) for shape in ((ROWS, P), (ROWS, T))]
    ids = torch.arange(ROWS)
    return ExperienceBatch(
        torch.where(prompt_mask, tokens[0], 10**9), prompt_mask, torch.where(mask, tokens[1], 10**9), mask, mask,
        ids, ids, ids, ids, numbers(1.0), ("",) * ROWS, ("",) * ROWS,
        old_logprobs_BT=numbers(0.3) - 4, values_BT=numbers(1.0), advantages_BT=numbers(1.0), returns_BT=numbers(1.0),
    )  # fmt: skip


def pairs(batch: ExperienceBatch, rows: list[int]) -> PairBatch:
    """Each of the rows as a chosen answer, the next row as its rejected one; of unequal weight, some of them with a soft label."""
    both = [*rows, *((row + 1) % ROWS for row in rows)]
    fields = list(vars(batch.select(both)).values())[:5]
    every = torch.arange(ROWS, dtype=torch.float64)
    return PairBatch(
        *fields,
        ref_logprob_2B=(-4.0 * batch.valid_tokens_B + every)[both],
        label_probability_B=torch.where(every % 3 == 0, 0.8, float("nan"))[rows],
        weight_B=(1.0 + every % 2)[rows],
    )


def engines(model: str, stage: int, folder: Path, rank: object) -> dict[str, tuple[DeepSpeedEngine, object]]:
    """Policy and value engines, padding and packing. The rate is too small to move a float32 weight: one serves many splits."""
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    config = {"dtype": "fp32", "clip_norm": 0.0, "trains": True}
    training = Training(OptimSection(lr=1e-30, schedule="constant", clip_norm=0.0), 100)
    algorithm = AlgorithmSection(entropy_coef=0.01)
    modules = {}
    for packing in (False, True):
        policy = PolicyModule(load_causal_lm(PolicySection(model=model), model), packing=packing)
        torch.manual_seed(1)
        value = load_token_scorer(ValueSection(), model, zero_head=True)
        torch.nn.init.normal_(value.score.weight)
        suffix = " packed" if packing else ""
        modules[f"policy{suffix}"] = policy, PolicyObjective(algorithm)
        modules[f"value{suffix}"] = ValueModule(value, packing=packing), ValueObjective(algorithm)
    return {
        name: (DeepSpeedEngine(module, resolve_deepspeed(str(path), **config), rank, training), objective)
        for name, (module, objective) in modules.items()
    }


def microbatches(select: Callable[[list[int]], SequenceBatch], count: int, rank: int, world_size: int) -> list[SequenceBatch]:
    """This rank's share in `count` microbatches; some may be empty, and ranks get unequal numbers of rows."""
    rows = list(range(rank, ROWS, world_size))
    parts = [rows[number::count] for number in range(count)]
    return [select(part) for part in parts if part]


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    rank = start_process_group(
        int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 0, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    )
    scratch = out.parent / f"rank{rank.rank}of{rank.world_size}"
    scratch.mkdir()
    found, metrics = {}, {}
    for stage in range(4):
        for name, (engine, objective) in engines(model, stage, scratch, rank).items():
            batch = experience(engine.module.model.config.vocab_size)
            losses = {name: (objective, batch.select, float(batch.valid_tokens_B.sum()))}
            if name.startswith("policy"):
                weight = float(pairs(batch, list(range(ROWS))).weight_B.sum())
                preference = DPOObjective(DPOSection(beta=0.3, label_smoothing=0.1))
                losses[name.replace("policy", "dpo")] = (preference, functools.partial(pairs, batch), weight)
            for loss, (function, select, denominator) in losses.items():
                for count in (1, 2, 3, 4):
                    engine.forward_backward(microbatches(select, count, rank.rank, rank.world_size), function, denominator)
                    gradient = [safe_get_full_grad(p) for p in engine.module.parameters()]
                    norm = engine.optimizer_step().grad_norm
                    key = f"{loss} zero{stage} world{rank.world_size} microbatches{count}"
                    found[key] = torch.cat([g.double().flatten() for g in gradient])
                    metrics[key] = norm
    for key, gradient, norm in reward_gradients(model, scratch, rank):
        found[key], metrics[key] = gradient, norm
    if rank.rank == 0:
        torch.save(found, out)
    stop_process_group()
    print(json.dumps(metrics))


main()
