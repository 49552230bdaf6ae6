"""The layouts that data files come in, the typed records they become, and how a layout is told from the columns of a row.

| layout | columns |
|---|---|
| prompts | prompt, or messages that end with the user's, or turns (the user's, one after another) |
| demonstrations | prompt + completion (question + answer, instruction + input + output, instruction + instances) |
| messages | a dialogue that ends with the assistant's turn |
| pairs | prompt (text or messages, or none) + chosen + rejected (text, the answer's message, or whole dialogues) |
| transcripts | chosen + rejected as whole texts: "\\n\\nHuman: … \\n\\nAssistant: …" |
| rankings | prompt + answers (or responses) + ranks (1 is best) or scores (more is better) |
| labelled | prompt + response_a + response_b + label (a, b, tie), or p, the probability that a is the better one |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, TypeAlias

from rlhf_dist.data.files import Row, place

Layout = Literal["prompts", "demonstrations", "messages", "pairs", "transcripts", "rankings", "labelled"]
LAYOUTS: tuple[Layout, ...] = ("prompts", "demonstrations", "messages", "pairs", "transcripts", "rankings", "labelled")
PREFERENCES: tuple[Layout, ...] = ("pairs", "transcripts", "rankings", "labelled")

Message: TypeAlias = dict[str, Any]
Prompt: TypeAlias = str | tuple[Message, ...]
"""Text, or the turns of a chat (each with `role` and `content`), the system's turn included."""

ASSISTANT = "\n\nAssistant:"
HUMAN = "\n\nHuman:"

NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "query"),
    "messages": ("messages",),
    "turns": ("turns",),
    "input": ("input",),
    "instances": ("instances",),
    "completion": ("completion", "response", "answer", "output"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "answers": ("answers", "responses", "completions"),
    "ranks": ("ranks",),
    "scores": ("scores",),
    "response_a": ("response_a", "answer_a"),
    "response_b": ("response_b", "answer_b"),
    "label": ("label",),
    "p": ("p", "probability"),
    "margin": ("margin",),
    "weight": ("weight",),
    "source": ("source",),
}
"""What each part of a record may be called; the first name that a row has, and not as null, is taken."""

TEXT_ROLES = ("prompt", "input", "completion", "chosen", "rejected", "response_a", "response_b", "label", "source")

_OWN: dict[Layout, tuple[str, ...]] = {
    "prompts": ("prompt", "messages", "turns"),
    "demonstrations": ("completion", "instances"),
    "messages": ("messages",),
    "pairs": ("chosen", "rejected"),
    "transcripts": ("chosen", "rejected"),
    "rankings": ("answers", "ranks", "scores"),
    "labelled": ("response_a", "response_b", "label", "p"),
}


@dataclass(frozen=True)
class Origin:
    """Where a record came from: file, row (from 0), and its source: the `source` column, or the name of the file."""

    file: str
    row: int
    source: str

    @property
    def where(self) -> str:
        """As errors name it: file:line, or file and row."""
        return place(self.file, self.row)


@dataclass(frozen=True)
class PromptOnly:
    """A prompt without an answer; `follow_ups` are the user's later turns, which can only be asked after an answer."""

    prompt: Prompt
    origin: Origin
    follow_ups: tuple[str, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the answer to imitate.

    prompt: text, or the turns before the last. completion: the last turn's text.
    turns: all turns of a dialogue, the assistant's earlier and last ones included; empty where the prompt is text.
    weight: of the row in a loss (`data balance` writes it).
    """

    prompt: Prompt
    completion: str
    origin: Origin
    turns: tuple[Message, ...] = ()
    weight: float = 1.0


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt.

    margin: how much better the chosen one was said to be, in score units, or None.
    label_probability: that the chosen one is the better (0.5 to 1 for labelled rows, 0.5 a tie), or None where the label is hard.
    preferred: the place at which the better one stood in a labelled row, or None where the layout does not tell.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    origin: Origin
    margin: float | None = None
    label_probability: float | None = None
    preferred: Literal["a", "b", "tie"] | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Ranking:
    """K answers to one prompt, best first.

    ranks: as given (1 is best), rising; where scores were given, 1 to K. scores: falling, or None. positions: of each answer in the row.
    """

    prompt: Prompt
    answers: tuple[str, ...]
    ranks: tuple[float, ...]
    origin: Origin
    scores: tuple[float, ...] | None = None
    positions: tuple[int, ...] = ()
    weight: float = 1.0

    def pairs(self) -> list[PreferencePair]:
        """The C(K, 2) pairs, better against worse, with the difference of the scores as margin; each has the row's weight."""
        return [
            PreferencePair(self.prompt, self.answers[i], self.answers[j], self.origin, margin=self._margin(i, j), weight=self.weight)
            for i, j in combinations(range(len(self.answers)), 2)
        ]

    def _margin(self, better: int, worse: int) -> float | None:
        return None if self.scores is None else self.scores[better] - self.scores[worse]


Record: TypeAlias = PromptOnly | Demonstration | PreferencePair | Ranking


def names_with(columns: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """`NAMES` with the user's own columns, given as {part: column}, put first.

    Raises:
        ValueError: a part that no record has.
    """
    unknown = sorted(set(columns) - set(NAMES))
    if unknown:
        raise ValueError(f"no record has a part called {unknown[0]!r}; there are {', '.join(NAMES)}")
    return NAMES | {part: (column, *(name for name in NAMES[part] if name != column)) for part, column in columns.items()}


def value_of(row: Row, part: str, names: Mapping[str, tuple[str, ...]]) -> Any:
    """The first non-null value among the columns that `part` may have; None where there is none."""
    for name in names[part]:
        value = row.get(name)
        if value is not None:
            return value
    return None


def column_of(row: Row, part: str, names: Mapping[str, tuple[str, ...]]) -> str | None:
    """The column that `value_of` reads, or one that is there but null, or None."""
    present = [name for name in names[part] if name in row]
    return next((name for name in present if row[name] is not None), present[0] if present else None)


def detect(row: Row, names: Mapping[str, tuple[str, ...]] = NAMES) -> Layout | None:
    """The layout that the non-null columns of a row tell; None where they tell none.

    A part of the marks is enough (a `chosen` without a `rejected` is a faulty pair, not a prompt).
    """

    def has(*parts: str) -> bool:
        return any(value_of(row, part, names) is not None for part in parts)

    if has("chosen", "rejected"):
        return "transcripts" if not has("prompt", "messages") and _is_transcript(row, names) else "pairs"
    if has("response_a", "response_b"):
        return "labelled"
    if has("answers") and has("ranks", "scores"):
        return "rankings"
    if has("prompt", "messages") and has("completion", "instances"):
        return "demonstrations"
    messages = value_of(row, "messages", names)
    if messages is not None:
        return "messages" if _ends_with_assistant(messages) else "prompts"
    return "prompts" if has("prompt", "turns") else None


def compatible(row: Row, layout: Layout, names: Mapping[str, tuple[str, ...]] = NAMES) -> bool:
    """Whether a row can be meant as one of `layout`, faulty perhaps; otherwise the file mixes layouts.

    A row that tells a lesser layout (a prompt, or nothing) is faulty where it has a column of the file's layout, though null or alone.
    """
    found = detect(row, names)
    if found == layout or found is None:
        return True
    if found == "pairs" and layout == "transcripts":
        return value_of(row, "prompt", names) is None and value_of(row, "messages", names) is None
    return found == "prompts" and layout != "prompts" and has_mark(row, layout, names)


def has_mark(row: Row, layout: Layout, names: Mapping[str, tuple[str, ...]] = NAMES) -> bool:
    """Whether a row has a column, null perhaps, that belongs to `layout`."""
    return any(column_of(row, part, names) is not None for part in _OWN[layout])


def other_columns(row: Row, layout: Layout, names: Mapping[str, tuple[str, ...]] = NAMES) -> Row:
    """The columns of a row that its record does not read, in their order; `source` and `weight` are among them."""
    parts = ["prompt", "messages", *_OWN[layout], *(("input",) if layout == "demonstrations" else ())]
    parts += ["margin", "p"] if layout in PREFERENCES else []
    used = {column_of(row, part, names) for part in parts}
    return {key: value for key, value in row.items() if key not in used}


def _is_transcript(row: Row, names: Mapping[str, tuple[str, ...]]) -> bool:
    texts = [value_of(row, part, names) for part in ("chosen", "rejected")]
    return any(isinstance(text, str) and ASSISTANT in text for text in texts)


def _ends_with_assistant(messages: Any) -> bool:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role") == "assistant"
