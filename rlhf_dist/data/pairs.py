"""Pairs of answers as preference optimisation takes them: which side is better, how surely, and what the reference says of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rlhf_dist.contracts.experience import SequenceBatch
from rlhf_dist.contracts.pairs import PairBatch
from rlhf_dist.data.answers import AnswersRow
from rlhf_dist.data.layouts import Origin
from rlhf_dist.data.token_rows import TokenRow, collate

TIE = 0.5


@dataclass(frozen=True)
class PairRow:
    """Two answers to one prompt, `trained` at the tokens of the answer.

    label_probability: that `chosen` is the better one, 0.5 (a tie) to 1, or None where the label is hard. weight: of the pair in the loss.
    reference: log-probabilities of both under the reference, in nats; None until it has been asked.
    origin: of the record that it was made of, where that is known.
    """

    chosen: TokenRow
    rejected: TokenRow
    label_probability: float | None = None
    weight: float = 1.0
    reference: tuple[float, float] | None = None
    origin: Origin | None = field(default=None, compare=False)

    def __len__(self) -> int:
        """Tokens of the pair in a padded batch, the padding of the shorter answer included."""
        return 2 * max(len(self.chosen), len(self.rejected))

    @property
    def tokens(self) -> int:
        """Tokens of both."""
        return len(self.chosen) + len(self.rejected)


def pair_of(row: AnswersRow, *, soft_labels: bool) -> tuple[PairRow | None, str]:
    """The pair of a row, the better answer first, and what became of it: "" where it is as it was given.

    Args:
        row: two answers.
        soft_labels: whether the loss reads label probabilities. Where it does not, a tie teaches nothing and is dropped, and any other
            probability becomes a hard label.

    Returns:
        The pair, None where it is dropped; and the fate to count.

    Raises:
        ValueError: a row of more or fewer than two answers.
    """
    chosen, rejected = row.answers
    probability, fate = row.label_probability, ""
    if probability is not None and not soft_labels:
        if probability == TIE:
            return None, "dropped: a tie, of which this loss learns nothing"
        fate = "" if probability in (0.0, 1.0) else "label taken as certain: this loss reads no probabilities"
    if probability is not None and probability < TIE:
        chosen, rejected, probability = rejected, chosen, 1.0 - probability
    return PairRow(chosen, rejected, probability if soft_labels else None, row.weight, origin=row.origin), fate


def sequences(rows: Sequence[PairRow]) -> SequenceBatch:
    """The pairs' 2B sequences, padded: all chosen ones, then the rejected ones. What the reference is asked about."""
    return collate([*(row.chosen for row in rows), *(row.rejected for row in rows)])


def collate_pairs(rows: Sequence[PairRow]) -> PairBatch:
    """What a loss is computed on.

    Raises:
        ValueError: a pair about which the reference has not been asked.
    """
    reference = [row.reference for row in rows if row.reference is not None]
    if len(reference) < len(rows):
        raise ValueError(f"the reference has not been asked about {len(rows) - len(reference)} of {len(rows)} pairs")
    probabilities = [math.nan if row.label_probability is None else row.label_probability for row in rows]
    return PairBatch(
        **vars(sequences(rows)),
        ref_logprob_2B=torch.tensor([chosen for chosen, _ in reference] + [rejected for _, rejected in reference], dtype=torch.float64),
        label_probability_B=torch.tensor(probabilities, dtype=torch.float64),
        weight_B=torch.tensor([row.weight for row in rows], dtype=torch.float64),
    )
