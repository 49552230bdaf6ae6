"""The worker of direct preference optimisation: pairs, a causal LM, and the reference's log-probs, taken once before the first step."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlhf_dist.algos.dpo_objective import DPOObjective
from rlhf_dist.algos.preference import sequence_logprob
from rlhf_dist.config.dpo import DPOConfig
from rlhf_dist.config.engines import EngineSection, PolicySection
from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.supervised import PairLogprobs, RowFacts, Side
from rlhf_dist.data.answers import AnswersEncoder, AnswersRow
from rlhf_dist.data.pairs import PairRow, collate_pairs, pair_of, sequences
from rlhf_dist.engines.deepspeed import DeepSpeedEngine
from rlhf_dist.engines.process import Rank
from rlhf_dist.models.loading import load_causal_lm, load_tokenizer, stop_tokens
from rlhf_dist.models.policy import PolicyModule
from rlhf_dist.workers.capsules import CapsuleWriter
from rlhf_dist.workers.rows import preference_rows
from rlhf_dist.workers.supervised import Rows, SupervisedWorker
from rlhf_dist.workers.training import build_engine, build_policy, seeded


class DPOWorker(SupervisedWorker):
    """Trains on pairs relative to a reference (contracts.supervised.ReferencedRole).

    Args:
        engine: trained engine.
        objective: of pairs.
        rows: `PairRow`s, the same on every rank.
        tokenizer: saved beside the exported weights.
        reference: a frozen engine, asked once and then let go; None: the trained engine itself, as it is before the first step.
        capsules: writes skipped steps down; None where none are.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        objective: DPOObjective,
        rows: Rows,
        tokenizer: Any,
        reference: DeepSpeedEngine | None = None,
        capsules: CapsuleWriter | None = None,
    ) -> None:
        super().__init__(engine, objective, rows, collate_pairs, tokenizer, capsules)
        self._reference = reference

    def describe(self) -> RowFacts:
        """Lengths and weights of all rows; packed, a pair is as long as its tokens."""
        facts = super().describe()
        assert facts.costs is not None
        facts = dataclasses.replace(facts, costs=facts.costs.together(2))
        if not self._engine.module.packing:
            return facts
        lengths, eval_lengths = (tuple(row.tokens for row in rows) for rows in (self._rows.train, self._rows.evaluation))
        return dataclasses.replace(facts, lengths=lengths, eval_lengths=eval_lengths)

    def ask_reference(self, side: Side, microbatches: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, PairLogprobs], ...]:
        """What the reference says of some rows of a side, by row number.

        Raises:
            UserError: a log-probability that is not finite.
        """
        source, cuts = self._rows.train if side == "train" else self._rows.evaluation, tuple(rows for rows in microbatches if rows)
        batches = [sequences(rows) for rows in self._cut(source, cuts)]
        answers: list[tuple[int, PairLogprobs]] = []
        for rows, batch, outputs in zip(cuts, batches, (self._reference or self._engine).forward(batches), strict=True):
            logprob_2B = sequence_logprob(outputs["logprobs_BT"], batch.response_mask_BT)
            if not bool(logprob_2B.isfinite().all()):
                fix = "its weights may be broken, or overflow in this precision: use bf16 or fp32"
                raise UserError("the reference's log-probabilities are not finite", where=f"{side} rows {list(rows)}", fix=fix)
            answers += zip(rows, zip(*(half.tolist() for half in logprob_2B.chunk(2)), strict=True), strict=True)
        return tuple(answers)

    def keep_reference(self, train: Sequence[PairLogprobs], evaluation: Sequence[PairLogprobs]) -> None:
        """Writes what it says to the rows, and frees an engine of its own."""
        old = self._rows
        self._rows = Rows(_told(old.train, train), _told(old.evaluation, evaluation), old.fates, old.eval_fates)
        if self._reference is not None:
            self._reference.close()
            self._reference = None


def build_dpo(config: DPOConfig, rank: Rank) -> DPOWorker:
    """Loads model, reference and rows on this rank."""
    seeded(config.run.seed)
    section = config.model
    tokenizer = load_tokenizer(section.model, trust_remote_code=section.trust_remote_code)
    rows = dpo_rows(config, tokenizer)
    engine = build_policy(section, config.run.seed, rank, config.training.total_steps(len(rows.train)))
    reference = _reference(section, config.reference.model, rank) if config.reference.model else None
    return DPOWorker(engine, DPOObjective(config.dpo), rows, tokenizer, reference, CapsuleWriter(engine, tokenizer, config))


def dpo_rows(config: DPOConfig, tokenizer: Any) -> Rows:
    """All pairs as tokens, rankings as their pairs; what was dropped, cut or read otherwise than it stands is counted by reason.

    Raises:
        UserError: a faulty or too long row where the config says `error`.
    """
    stops = stop_tokens(config.model.model, tokenizer, trust_remote_code=config.model.trust_remote_code)
    read = preference_rows(config.data, AnswersEncoder(tokenizer, stops), as_pairs=True)
    soft = config.dpo.loss == "sigmoid"
    (train, fates), (evaluation, eval_fates) = (_pairs(rows, soft_labels=soft) for rows in (read.train, read.evaluation))
    return Rows(train, evaluation, dict(Counter(read.fates) + fates + eval_fates), dict(Counter(read.eval_fates) + eval_fates))


def _pairs(rows: Sequence[AnswersRow], *, soft_labels: bool) -> tuple[list[PairRow], Counter[str]]:
    made = [pair_of(row, soft_labels=soft_labels) for row in rows]
    return [pair for pair, _ in made if pair is not None], Counter(fate for _, fate in made if fate)


def _reference(section: PolicySection, path: str, rank: Rank) -> DeepSpeedEngine:
    """Another model, frozen, held as the trained one is: precision, kernel, DeepSpeed file."""
    same = EngineSection.model_validate(section.model_dump(include=set(EngineSection.model_fields)))
    return build_engine(PolicyModule(load_causal_lm(same, path), packing=section.packing), same, rank)


def _told(rows: Sequence[PairRow], reference: Sequence[PairLogprobs]) -> list[PairRow]:
    return [dataclasses.replace(row, reference=said) for row, said in zip(rows, reference, strict=True)]
