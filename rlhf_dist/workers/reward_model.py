"""The worker of a reward model in training: preferences, a sequence classifier, and the scores of its rows for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_dist.algos.reward_objective import RewardObjective
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.reward_model import RewardModelConfig, ScorerSection
from rlhf_dist.contracts.supervised import RowFacts, Side
from rlhf_dist.data.answer_batches import collate_answers
from rlhf_dist.data.answers import AnswersEncoder, AnswersRow
from rlhf_dist.engines.deepspeed import Training
from rlhf_dist.engines.process import Rank
from rlhf_dist.evaluation.judged import JudgedPair, judged_pairs
from rlhf_dist.models.loading import load_tokenizer, name_stops, stop_tokens
from rlhf_dist.models.lora import add_adapter
from rlhf_dist.models.reward_model import HEAD, RewardModelModule, load_reward_model, separate_pad
from rlhf_dist.workers.capsules import CapsuleWriter
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

    def _cuts(self, source: Sequence[Any], microbatches: tuple[tuple[int, ...], ...]) -> list[tuple[int, ...]]:
        """Rows with different numbers of answers apart: padded together they would exceed the budget that each was counted in."""
        together = super()._cuts(source, microbatches)
        if self._engine.module.packing:
            return together
        counts = [sorted({len(source[row].answers) for row in rows}) for rows in together]
        return [tuple(row for row in rows if len(source[row].answers) == k) for rows, ks in zip(together, counts, strict=True) for k in ks]


def with_margin(rows: Sequence[AnswersRow]) -> int:
    """Rows in whose loss a margin counts: pairs with a hard label and a margin other than 0."""
    return sum(bool(row.margin) and row.label_probability is None for row in rows)


def build_reward_model(config: RewardModelConfig, rank: Rank) -> RewardModelWorker:
    """Loads model and rows on this rank.

    Raises:
        UserError: a row or a model that cannot be used, or margins that are asked for and that no row has.
    """
    seeded(config.run.seed)
    section, tokens = config.model, tokens_of(config.model)
    tokenizer, stops, pad = tokens.tokenizer, tokens.stops, tokens.pad
    rows = preference_rows(config.data, AnswersEncoder(tokenizer, stops), as_pairs=False, pad=pad)
    if config.reward_model.margins and rows.train and not with_margin(rows.train):
        what = f"reward_model.margins is on, and none of the {len(rows.train)} training rows is a pair with a hard label and a margin"
        raise UserError(
            what, where="data.train", fix="give the rows a column `margin` (numbers other than 0), or set reward_model.margins=false"
        )
    training = Training(section.optim, config.training.total_steps(len(rows.train)))
    engine = build_engine(reward_module(config, tokens), section, rank, training)
    capsules = CapsuleWriter(engine, tokenizer, config)
    return RewardModelWorker(engine, reward_objective(config), rows, collate_answers, tokenizer, capsules)


@dataclass(frozen=True)
class Tokens:
    """tokenizer: with a pad token that no text holds. stops: ids that end a text. pad: the pad's id."""

    tokenizer: Any
    stops: tuple[int, ...]
    pad: int


def tokens_of(section: ScorerSection) -> Tokens:
    """The tokens of a model that learns to score.

    Raises:
        UserError: no such model, or one without a tokenizer.
    """
    tokenizer = load_tokenizer(section.model, trust_remote_code=section.trust_remote_code)
    stops = stop_tokens(section.model, tokenizer, trust_remote_code=section.trust_remote_code)
    return Tokens(tokenizer, stops, separate_pad(tokenizer, stops))


def reward_module(config: RewardModelConfig, tokens: Tokens) -> RewardModelModule:
    """The reward model before its first step, with a new adapter where it trains one.

    Raises:
        UserError: the model cannot be loaded.
    """
    section = config.model
    model: Any = load_reward_model(section, section.model, tokens.pad, config.run.seed)
    name_stops(model.config, tokens.stops)  # whoever scores chats must end them as here
    if section.lora is not None:
        model = add_adapter(model, section.lora, config.run.seed, head=HEAD)
    return RewardModelModule(prepare_checkpointing(model, section), packing=section.packing)


def reward_objective(config: RewardModelConfig) -> Any:
    """What a reward model is trained on: an `Objective` of `PreferenceBatch`."""
    return RewardObjective(config.reward_model.ranking, config.reward_model.margins, config.reward_model.centring)
