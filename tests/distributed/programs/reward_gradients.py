"""Gradients of the reward model's loss of one batch, ZeRO stages × numbers of microbatches × padded and packed: a part of gradients.py."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
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
from rlhf_dist.engines.process import Rank
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


def engine(model: str, stage: int, packing: bool, folder: Path, rank: Rank) -> DeepSpeedEngine:
    """At a stage. The learning rate is too small to move a float32 weight, so one engine serves many splits."""
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    config = resolve_deepspeed(str(path), dtype="fp32", clip_norm=0.0, trains=True)
    training = Training(OptimSection(lr=1e-30, schedule="constant", clip_norm=0.0), 100)
    module = RewardModelModule(load_reward_model(EngineSection(), model, 0, 1), packing=packing)
    return DeepSpeedEngine(module, config, rank, training)


def reward_gradients(model: str, scratch: Path, rank: Rank) -> Iterator[tuple[str, torch.Tensor, float]]:
    """Key, gradient and reported norm of every stage and split."""
    objective = RewardObjective("all_pairs", margins=True, centring=0.05)
    for stage, packing in itertools.product(range(4), (False, True)):
        made = engine(model, stage, packing, scratch, rank)
        every = rows(made.module.model.config.vocab_size)
        mine, weight = every[rank.rank :: rank.world_size], sum(row.weight for row in every)
        for count in (1, 2, 3, 4):
            parts = [poisoned(collate_answers(mine[number::count])) for number in range(count) if mine[number::count]]
            made.forward_backward(parts, objective, weight)
            gradient = torch.cat([safe_get_full_grad(p).double().flatten() for p in made.module.parameters()])
            yield (
                f"reward{' packed' if packing else ''} zero{stage} world{rank.world_size} microbatches{count}",
                gradient,
                made.optimizer_step().grad_norm,
            )
