"""Direct preference optimisation as a stage of the supervised loop: the reference is asked once, before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_dist.contracts.supervised import PairLogprobs, ReferencedRole, Side
from rlhf_dist.training.supervised import Setting, Stage


def ask_reference(setting: Setting) -> dict[str, Any]:
    """Every rank asks about its share of all rows, train and held-out; what the reference says goes to every rank.

    Two numbers a row pass through here, whatever the length of the answers (law 7).

    Returns:
        Mean log-probabilities under the reference of the training rows, by side of the pair, in nats.
    """
    group, facts = setting.group, setting.facts
    train = _side(setting, "train", facts.lengths)
    evaluation = _side(setting, "eval", facts.eval_lengths)
    group.collect(group.submit(ReferencedRole.keep_reference, [(train, evaluation)] * group.world_size))
    chosen, rejected = (sum(column) / len(train) for column in zip(*train, strict=True))
    return {"reference": {"logps/chosen": chosen, "logps/rejected": rejected}}


def _side(setting: Setting, side: Side, lengths: Sequence[int]) -> tuple[PairLogprobs, ...]:
    if not lengths:
        return ()
    group = setting.group
    arguments = [(side, share) for share in setting.shares(lengths)]
    answers = dict(answer for answers in group.collect(group.submit(ReferencedRole.ask_reference, arguments)) for answer in answers)
    return tuple(answers[row] for row in range(len(lengths)))


DPO = Stage(name="dpo", score="eval/loss", prepare=ask_reference)
