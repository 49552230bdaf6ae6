"""The models of the supervised stages, as a replay needs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_dist.algos.dpo_objective import DPOObjective
from rlhf_dist.algos.likelihood import nll_objective
from rlhf_dist.config.loading import load_config
from rlhf_dist.config.stages import config_of
from rlhf_dist.contracts.engine import Objective, Outputs
from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.data.answer_batches import collate_answers
from rlhf_dist.data.answers import AnswersRow
from rlhf_dist.data.pairs import PairRow, collate_pairs
from rlhf_dist.data.token_rows import TokenRow, collate_demonstrations
from rlhf_dist.models.loading import load_tokenizer
from rlhf_dist.runs.capsule import CONFIG, MODEL, Capsule
from rlhf_dist.runs.capsule_rows import NumberedRow
from rlhf_dist.workers.replay_subject import Look, alone, rebuilt, token_fault
from rlhf_dist.workers.reward_model import reward_module, reward_objective, tokens_of
from rlhf_dist.workers.training import supervised_policy


@dataclass(frozen=True)
class Kind:
    """What differs between the stages.

    module, objective: of a config, before the first step. collate: rows → what the module takes.
    texts: of a row, by what they are; in this order the module answers for a row alone.
    places: (texts of each row of a microbatch, row) → where the module's answers for the row are.
    given: (row, config) → the numbers of the row that the loss reads, by what they are.
    """

    module: Callable[[Any], Any]
    objective: Callable[[Any], Objective]
    collate: Callable[[Sequence[Any]], Any]
    texts: Callable[[Any], dict[str, TokenRow]]
    places: Callable[[Sequence[int], int], Sequence[int]]
    given: Callable[[Any, Any], dict[str, float | None]]


class RowsSubject:
    """See `workers.replay_subject.Subject`.

    Raises:
        UserError: see `rebuilt`.
    """

    def __init__(self, capsule: Capsule) -> None:
        config: Any = load_config(config_of(capsule.facts.stage), capsule.folder / CONFIG)
        section, kind = config.model, KINDS[capsule.facts.stage]
        self._capsule, self._kind, self._config, self.dtype = capsule, kind, config, section.dtype
        self.module: Any = rebuilt(capsule, section, lambda built: kind.module(config.model_copy(update={"model": built})))
        self.objective = kind.objective(config)
        beside = section.model if section.lora is not None else str(capsule.folder / MODEL)
        self._tokenizer = load_tokenizer(beside, trust_remote_code=section.trust_remote_code)

    def rows(self, rank: int) -> tuple[NumberedRow, ...]:
        """The rows of a rank."""
        return self._capsule.rows(rank)

    def batch(self, rows: Sequence[NumberedRow], places: Sequence[int]) -> Any:
        """A microbatch of them."""
        return self._kind.collate([rows[place].row for place in places])

    def looks(self, rows: Sequence[NumberedRow], places: Sequence[int], outputs: Outputs) -> Iterator[Look]:
        """The microbatch row by row."""
        kind, chosen = self._kind, [rows[place] for place in places]
        counts = [len(kind.texts(each.row)) for each in chosen]
        for number, each in enumerate(chosen):
            batch, texts = kind.collate([each.row]), kind.texts(each.row)
            answers = alone(outputs, kind.places(counts, number), batch)
            fault = _given_fault(kind.given(each.row, self._config)) or _answer_fault(list(texts), answers, batch)
            tokens = sum(int(text.trained.sum()) for text in texts.values())
            yield Look(f"row {each.number}", tokens, fault, self._shown(each, texts), batch, answers)

    def _shown(self, numbered: NumberedRow, texts: Mapping[str, TokenRow]) -> dict[str, str]:
        """Where the row came from, its prompt, and what is learnt of."""
        origin, first = numbered.row.origin, next(iter(texts.values()))
        shown = {} if origin is None else {"from": origin.where}
        shown["prompt"] = self._text(first.tokens[: _start(first)])
        return shown | {name: self._text(text.tokens[_start(text) :]) for name, text in texts.items()}

    def _text(self, tokens: NDArray[np.int32]) -> str:
        return str(self._tokenizer.decode(tokens.tolist()))


def _start(text: TokenRow) -> int:
    """Of what is learnt."""
    return int(text.trained.argmax())


def _given_fault(given: Mapping[str, float | None]) -> str:
    wrong = ((name, value) for name, value in given.items() if value is not None and not math.isfinite(value))
    return next((f"{name} is {value}" for name, value in wrong), "")


def _answer_fault(names: Sequence[str], outputs: Outputs, batch: Any) -> str:
    """The first number of the module's answers to a row that is not finite."""
    if not isinstance(batch, SequenceBatch):
        scored = zip(names, outputs["score_B"].tolist(), strict=True)
        return next((f"the model's score of {name} is {value}" for name, value in scored if not math.isfinite(value)), "")
    texts = [(row, f" of {name}" if len(names) > 1 else "") for row, name in enumerate(names)]
    faults = (token_fault("the model's logprobs_BT", outputs["logprobs_BT"], batch, row, of) for row, of in texts)
    return next((fault for fault in faults if fault), "")


def _in_turn(counts: Sequence[int], row: int) -> Sequence[int]:
    """Row by row."""
    start = sum(counts[:row])
    return range(start, start + counts[row])


def _halves(counts: Sequence[int], row: int) -> Sequence[int]:
    """All chosen ones, then the rejected ones."""
    return row, len(counts) + row


def _pair_given(row: PairRow, config: Any) -> dict[str, float | None]:
    chosen, rejected = row.reference or (None, None)
    said = {"reference log-prob of chosen": chosen, "reference log-prob of rejected": rejected}
    return said | {"label probability": row.label_probability, "weight": row.weight}


def _answers_given(row: AnswersRow, config: Any) -> dict[str, float | None]:
    """A margin counts for hard pairs alone, and where it is asked for."""
    pair, soft = len(row.answers) == 2, row.label_probability is not None
    margin = row.margin if config.reward_model.margins and pair and not soft else None
    return {"margin": margin, "label probability": row.label_probability if pair else None, "weight": row.weight}


def _answers(row: AnswersRow) -> dict[str, TokenRow]:
    return {f"answer {place}": answer for place, answer in enumerate(row.answers, start=1)}


def _policy(config: Any) -> Any:
    return supervised_policy(config.model, config.run.seed)


KINDS = {
    "sft": Kind(
        _policy,
        lambda config: nll_objective,
        collate_demonstrations,
        lambda row: {"completion": row},
        _in_turn,
        lambda row, config: {"weight": row.token_weight},
    ),
    "dpo": Kind(
        _policy,
        lambda config: DPOObjective(config.dpo),
        collate_pairs,
        lambda row: {"chosen": row.chosen, "rejected": row.rejected},
        _halves,
        _pair_given,
    ),
    "reward": Kind(
        lambda config: reward_module(config, tokens_of(config.model)), reward_objective, collate_answers, _answers, _in_turn, _answers_given
    ),
}
