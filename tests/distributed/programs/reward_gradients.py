"""One rank: gradients of the reward model's loss of one batch, over ZeRO stages × numbers of microbatches; rank 0 saves them.

usage: reward_gradients.py MODEL OUT.pt
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad

from rlhf_dist.algos.reward_objective import RewardObjective
from rlhf_dist.config.deepspeed import resolve_deepspeed
from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.optim import OptimSection
from rlhf_dist.contracts.preferences import PreferenceBatch
from rlhf_dist.data.answer_batches import collate_answers
from rlhf_dist.data.answers import AnswersRow
from rlhf_dist.data.token_rows import TokenRow
from rlhf_dist.engines.deepspeed import DeepSpeedEngine, Training
from rlhf_dist.engines.process import Rank, start_process_group, stop_process_group
from rlhf_dist.models.reward_model import RewardModelModule, load_reward_model

KINDS = [{}, {"margin": 0.7}, {"label_probability": 0.8}, {"weight": 2.5}, {}, {"label_probability": 0.5}, {"weight": 0.3}]
ANSWERS = (2, 2, 2, 3, 4, 2, 2)


def rows(vocabulary: int) -> list[AnswersRow]:
    """Hard and soft pairs and rankings of ragged texts, some of them weighted."""
    draw = np.random.default_rng(5)

    def text() -> TokenRow:
        length = int(draw.integers(2, 14))
        return TokenRow(draw.integers(3, vocabulary, length).astype(np.int32), np.arange(length) > 0)

    return [AnswersRow(tuple(text() for _ in range(count)), 0, "s", **kind) for count, kind in zip(ANSWERS, KINDS, strict=True)]


def poisoned(batch: PreferenceBatch) -> PreferenceBatch:
    """With junk wherever nothing stands."""
    tokens, answers = torch.where(batch.mask_NL, batch.tokens_NL, 10**9), torch.where(batch.mask_BK, batch.answers_BK, 10**9)
    return dataclasses.replace(batch, tokens_NL=tokens, answers_BK=answers)


def engine(model: str, stage: int, folder: Path, rank: Rank) -> DeepSpeedEngine:
    """At a stage. The learning rate is too small to move a float32 weight, so one engine serves many splits."""
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    config = resolve_deepspeed(str(path), dtype="fp32", clip_norm=0.0, trains=True)
    training = Training(OptimSection(lr=1e-30, schedule="constant", clip_norm=0.0), 100)
    return DeepSpeedEngine(RewardModelModule(load_reward_model(EngineSection(), model, 0, 1)), config, rank, training)


def main() -> None:
    model, out = sys.argv[1], Path(sys.argv[2])
    place = os.environ
    rank = start_process_group(int(place["RANK"]), int(place["WORLD_SIZE"]), 0, place["MASTER_ADDR"], int(place["MASTER_PORT"]))
    scratch = out.parent / f"reward_rank{rank.rank}of{rank.world_size}"
    scratch.mkdir()
    objective = RewardObjective("all_pairs", margins=True, centring=0.05)
    found, metrics = {}, {}
    for stage in range(4):
        made = engine(model, stage, scratch, rank)
        every = rows(made.module.model.config.vocab_size)
        mine, weight = every[rank.rank :: rank.world_size], sum(row.weight for row in every)
        for count in (1, 3, 5):
            parts = [poisoned(collate_answers(mine[number::count])) for number in range(count) if mine[number::count]]
            made.forward_backward(parts, objective, weight)
            gradient = [safe_get_full_grad(p) for p in made.module.parameters()]
            key = f"zero{stage} world{rank.world_size} microbatches{count}"
            found[key] = torch.cat([g.double().flatten() for g in gradient])
            metrics[key] = made.optimizer_step().grad_norm
    if rank.rank == 0:
        torch.save(found, out)
    stop_process_group()
    print(json.dumps(metrics))


main()
