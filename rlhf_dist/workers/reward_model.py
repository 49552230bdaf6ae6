"""The worker of a reward model in training: preferences, a sequence classifier, and the scores of its rows for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlhf_dist.algos.reward_objective import RewardObjective
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.reward_model import RewardModelConfig
from rlhf_dist.contracts.supervised import RowFacts, Side
from rlhf_dist.data.answer_batches import collate_answers
from rlhf_dist.data.answers import AnswersEncoder, AnswersRow
from rlhf_dist.engines.deepspeed import Training
from rlhf_dist.engines.process import Rank
from rlhf_dist.evaluation.judged import JudgedPair, judged_pairs
from rlhf_dist.models.loading import load_tokenizer, name_stops, stop_tokens
from rlhf_dist.models.lora import add_adapter
from rlhf_dist.models.reward_model import HEAD, RewardModelModule, load_reward_model, separate_pad
from rlhf_dist.workers.rows import preference_rows
from rlhf_dist.workers.supervised import SupervisedWorker
from rlhf_dist.workers.training import build_engine, prepare_checkpointing, seeded


class RewardModelWorker(SupervisedWorker):
    """Trains a sequence classifier on rows of answers (contracts.supervised.RewardModelRole)."""

    def describe(self) -> RowFacts:
        """As of any worker, and how many training rows have a margin that could count; packed, a row is as long as its tokens."""
        facts, rows = super().describe(), [*self._rows.train, *self._rows.evaluation]
        assert facts.costs is not None
        answers = sum(len(row.answers) for row in rows) / max(1, len(rows))
        shown = facts.facts | {"rows with a margin": with_margin(self._rows.train)}
        facts = replace(facts, facts=shown, costs=facts.costs.together(answers or 1))
        if not self._engine.module.packing:
            return facts
        lengths, eval_lengths = (tuple(row.tokens for row in rows) for rows in (self._rows.train, self._rows.evaluation))
        return replace(facts, lengths=lengths, eval_lengths=eval_lengths)

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
        if self._engine.module.packing:
            return together
        counts = [sorted({len(row.answers) for row in rows}) for rows in together]
        return [[row for row in rows if len(row.answers) == k] for rows, ks in zip(together, counts, strict=True) for k in ks]


def with_margin(rows: Sequence[AnswersRow]) -> int:
    """Rows in whose loss a margin counts: pairs with a hard label and a margin other than 0."""
    return sum(bool(row.margin) and row.label_probability is None for row in rows)


def build_reward_model(config: RewardModelConfig, rank: Rank) -> RewardModelWorker:
    """Loads model and rows on this rank.

    Raises:
        UserError: a row or a model that cannot be used, or margins that are asked for and that no row has.
    """
    seeded(config.run.seed)
    section = config.model
    tokenizer = load_tokenizer(section.model, trust_remote_code=section.trust_remote_code)
    stops = stop_tokens(section.model, tokenizer, trust_remote_code=section.trust_remote_code)
    pad = separate_pad(tokenizer, stops)
    rows = preference_rows(config.data, AnswersEncoder(tokenizer, stops), as_pairs=False, pad=pad)
    if config.reward_model.margins and rows.train and not with_margin(rows.train):
        what = f"reward_model.margins is on, and none of the {len(rows.train)} training rows is a pair with a hard label and a margin"
        raise UserError(
            what, where="data.train", fix="give the rows a column `margin` (numbers other than 0), or set reward_model.margins=false"
        )
    model: Any = load_reward_model(section, section.model, pad, config.run.seed)
    name_stops(model.config, stops)  # whoever scores chats must end them as here
    if section.lora is not None:
        model = add_adapter(model, section.lora, config.run.seed, head=HEAD)
    training = Training(section.optim, config.training.total_steps(len(rows.train)))
    module: Any = prepare_checkpointing(model, section)
    engine = build_engine(RewardModelModule(module, packing=section.packing), section, rank, training)
    objective: Any = RewardObjective(config.reward_model.ranking, config.reward_model.margins, config.reward_model.centring)
    return RewardModelWorker(engine, objective, rows, collate_answers, tokenizer)
