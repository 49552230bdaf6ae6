"""Why a row is no record: the reasons to count by, and what to do about each."""

from __future__ import annotations

from typing import Literal

from rlhf_dist.config.errors import UserError

Reason = Literal[
    "unreadable row",
    "mixed layouts",
    "missing field",
    "null field",
    "wrong type",
    "empty prompt",
    "nothing to answer",
    "empty completion",
    "empty final turn",
    "no final assistant turn",
    "prompts differ",
    "chosen equals rejected",
    "one answer",
    "equal answers",
    "ties in the ranking",
    "ranks and answers differ in number",
    "label outside the options",
    "number out of range",
    "several instances",
    "refused by the chat template",
]

MEND: dict[Reason, str] = {
    "unreadable row": "write the row again as UTF-8 JSON",
    "mixed layouts": "put each layout into a file of its own",
    "missing field": "give the row the column, or remove the row",
    "null field": "fill the column, or remove the row",
    "wrong type": "write text where text is wanted, and lists where lists are",
    "empty prompt": "give the prompt text, or remove the row",
    "nothing to answer": "let the prompt end with the user's turn",
    "empty completion": "give it text, or remove the row",
    "empty final turn": "give the last assistant turn text, or remove the row",
    "no final assistant turn": "end the dialogue with the assistant's turn",
    "prompts differ": "let both dialogues differ in the last assistant turn only",
    "chosen equals rejected": "remove the row: equal answers teach no preference",
    "one answer": "give at least two answers",
    "equal answers": "remove one of the equal answers",
    "ties in the ranking": "break the tie, or leave one of the answers out",
    "ranks and answers differ in number": "give one rank or score to each answer",
    "label outside the options": "write a, b or tie, or p between 0 and 1, the probability that response_a is better",
    "number out of range": "write a finite number that is not negative (a weight: one above 0)",
    "several instances": "write one row for each instance",
    "refused by the chat template": "order roles as the model expects them",
}


class RowFault(Exception):
    """Why a row is no record: `reason` to count by, `detail` for people, `where` the row is."""

    def __init__(self, reason: Reason, detail: str, *, where: str = "") -> None:
        super().__init__(reason, detail, where)
        self.reason: Reason = reason
        self.detail, self.where = detail, where

    def as_error(self, *, may_drop: bool = True) -> UserError:
        """The error that stops a run."""
        fix = MEND[self.reason] + ("; or leave such rows out and count them: data.faults=drop, or --errors drop" if may_drop else "")
        return UserError(self.detail, where=self.where, fix=fix)
