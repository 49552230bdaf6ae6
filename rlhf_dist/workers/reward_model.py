"""The worker of a reward model in training: preferences, a sequence classifier, and the scores of its rows for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_dist.algos.reward_objective import RewardObjective
from rlhf_dist.config.reward_model import RewardModelConfig
from rlhf_dist.contracts.supervised import Side
from rlhf_dist.data.answer_batches import collate_answers
from rlhf_dist.data.answers import AnswersEncoder
from rlhf_dist.engines.deepspeed import Training
from rlhf_dist.engines.process import Rank
from rlhf_dist.evaluation.judged import JudgedPair, judged_pairs
from rlhf_dist.models.loading import load_tokenizer, stop_tokens
from rlhf_dist.models.lora import add_adapter
from rlhf_dist.models.reward_model import HEAD, RewardModelModule, load_reward_model, separate_pad
from rlhf_dist.workers.rows import preference_rows
from rlhf_dist.workers.supervised import SupervisedWorker
from rlhf_dist.workers.training import build_engine, prepare_checkpointing, seeded


class RewardModelWorker(SupervisedWorker):
    """Trains a sequence classifier on rows of answers (contracts.supervised.RewardModelRole)."""

    def judge(self, side: Side, microbatches: tuple[tuple[int, ...], ...]) -> tuple[JudgedPair, ...]:
        """This rank's rows as judged pairs, in the order of the microbatches. Collective."""
        source = self._rows.train if side == "train" else self._rows.evaluation
        batches = self._cut(source, microbatches)
        outputs = self._engine.forward([self._collate(rows) for rows in batches])
        judged: list[JudgedPair] = []
        for rows, output in zip(batches, outputs, strict=True):
            scores = iter(output["score_B"].tolist())
            for row in rows:
                judged += judged_pairs(row, [next(scores) for _ in row.answers])
        return tuple(judged)

    def _cut(self, source: Sequence[Any], microbatches: tuple[tuple[int, ...], ...]) -> list[list[Any]]:
        """Rows with different numbers of answers apart: padded together they would exceed the budget that each was counted in."""
        together = super()._cut(source, microbatches)
        counts = [sorted({len(row.answers) for row in rows}) for rows in together]
        return [[row for row in rows if len(row.answers) == k] for rows, ks in zip(together, counts, strict=True) for k in ks]


def build_reward_model(config: RewardModelConfig, rank: Rank) -> RewardModelWorker:
    """Loads model and rows on this rank."""
    seeded(config.run.seed)
    section = config.model
    tokenizer = load_tokenizer(section.model, trust_remote_code=section.trust_remote_code)
    stops = stop_tokens(section.model, tokenizer, trust_remote_code=section.trust_remote_code)
    pad = separate_pad(tokenizer, stops)
    rows = preference_rows(config.data, AnswersEncoder(tokenizer, stops), as_pairs=False, pad=pad)
    model: Any = load_reward_model(section, section.model, pad, config.run.seed)
    if len(stops) > 1:  # a classifier is saved without generation_config.json: whoever scores chats must end them as here
        model.config.eos_token_id = list(stops)
    if section.lora is not None:
        model = add_adapter(model, section.lora, config.run.seed, head=HEAD)
    training = Training(section.optim, config.training.total_steps(len(rows.train)))
    module: Any = prepare_checkpointing(model, section)
    engine = build_engine(RewardModelModule(module), section, rank, training)
    objective: Any = RewardObjective(config.reward_model.ranking, config.reward_model.margins, config.reward_model.centring)
    return RewardModelWorker(engine, objective, rows, collate_answers, tokenizer)
