"""Rows of a supervised stage in a capsule: a JSON object a line, from which they come back bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from rlhf_dist.config.errors import UserError
from rlhf_dist.data.answers import AnswersRow
from rlhf_dist.data.layouts import Origin
from rlhf_dist.data.pairs import PairRow
from rlhf_dist.data.token_rows import TokenRow

Row: TypeAlias = TokenRow | PairRow | AnswersRow


@dataclass(frozen=True)
class NumberedRow:
    """A row as it was trained on. number: in the run's training rows, from 0."""

    number: int
    row: Row


def write_rows(folder: Path, rank: int, rows: Sequence[NumberedRow]) -> None:
    """Writes the rows of a rank as `rows_<rank>.jsonl`.

    Raises:
        OSError: the disk is full, or the like.
    """
    lines = (json.dumps(written(_line(each).model_dump()), allow_nan=False) for each in rows)
    _file(folder, rank).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_rows(folder: Path, rank: int) -> tuple[NumberedRow, ...]:
    """What `write_rows` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = _file(folder, rank)
    try:
        lines = [_LINES.validate_python(json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return tuple(NumberedRow(line.number, line.row()) for line in lines)
    except (OSError, ValueError, RecursionError) as error:
        what = f"the file {path.name} of the capsule cannot be read: {type(error).__name__}"
        raise UserError(what, where=str(folder), fix="use another capsule") from None


def written(value: Any) -> Any:
    """A value as JSON can hold it, which has no NaN and no infinity: those become words, which pydantic reads as such."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {name: written(each) for name, each in value.items()}
    return [written(each) for each in value] if isinstance(value, list | tuple) else value


class _Text(BaseModel):
    """Tokens, and for each whether it is trained on, as 1 or 0."""

    model_config = ConfigDict(extra="forbid")
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]
    trained: Annotated[str, Field(pattern="^[01]+$")]

    @classmethod
    def of(cls, row: TokenRow) -> _Text:
        return cls(tokens=row.tokens.tolist(), trained="".join("1" if each else "0" for each in row.trained))

    def row(self, weight: float = 1.0, origin: Origin | None = None) -> TokenRow:
        if len(self.tokens) != len(self.trained):
            raise ValueError(f"{len(self.tokens)} tokens, {len(self.trained)} marks")
        return TokenRow(np.array(self.tokens, np.int32), np.array([mark == "1" for mark in self.trained]), weight, origin)


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid")
    number: Annotated[int, Field(ge=0)]
    origin: Origin | None
    weight: float


class _Demonstration(_Line):
    kind: Literal["demonstration"] = "demonstration"
    text: _Text

    def row(self) -> TokenRow:
        return self.text.row(self.weight, self.origin)


class _Pair(_Line):
    kind: Literal["pair"] = "pair"
    chosen: _Text
    rejected: _Text
    label_probability: float | None
    reference: tuple[float, float] | None

    def row(self) -> PairRow:
        return PairRow(self.chosen.row(), self.rejected.row(), self.label_probability, self.weight, self.reference, self.origin)


class _Answers(_Line):
    kind: Literal["answers"] = "answers"
    answers: Annotated[list[_Text], Field(min_length=2)]
    prompt: int
    source: str
    margin: float | None
    label_probability: float | None

    def row(self) -> AnswersRow:
        answers = tuple(answer.row() for answer in self.answers)
        return AnswersRow(answers, self.prompt, self.source, self.margin, self.label_probability, self.weight, self.origin)


_LINES: TypeAdapter[_Demonstration | _Pair | _Answers] = TypeAdapter(
    Annotated[_Demonstration | _Pair | _Answers, Field(discriminator="kind")]
)


def _line(numbered: NumberedRow) -> _Line:
    row = numbered.row
    known: dict[str, Any] = {"number": numbered.number, "origin": row.origin}
    if isinstance(row, TokenRow):
        return _Demonstration(**known, weight=row.token_weight, text=_Text.of(row))
    known |= {"weight": row.weight, "label_probability": row.label_probability}
    if isinstance(row, PairRow):
        return _Pair(**known, chosen=_Text.of(row.chosen), rejected=_Text.of(row.rejected), reference=row.reference)
    answers = [_Text.of(answer) for answer in row.answers]
    return _Answers(**known, answers=answers, prompt=row.prompt, source=row.source, margin=row.margin)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rows_{rank:04d}.jsonl"
