"""One row into one typed record, or the reason why not.

What a record holds is exactly what the row said: texts are neither stripped nor joined, so prompt + completion of a transcript is the
transcript. A fault has a short reason, the same for every such row, to count by, and a detail for people.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from rlhf_dist.data.faults import RowFault
from rlhf_dist.data.files import Row
from rlhf_dist.data.layouts import (
    ASSISTANT,
    NAMES,
    Demonstration,
    Layout,
    Message,
    Origin,
    PreferencePair,
    Prompt,
    PromptOnly,
    Ranking,
    Record,
    column_of,
    value_of,
)


def parse(row: Row, layout: Layout, origin: Origin, names: Mapping[str, tuple[str, ...]] = NAMES) -> Record:
    """The record of a row.

    Args:
        row: the columns.
        layout: of the file.
        origin: where the row stands; its `source` is the file's name, and gives way to the row's own.
        names: what the parts may be called.

    Raises:
        RowFault: the row is no record of this layout.
    """
    fields = _Fields(row, names)
    source = value_of(row, "source", names)
    origin = origin if source is None else Origin(origin.file, origin.row, str(source))
    try:
        return _PARSERS[layout](fields, origin)
    except RowFault as fault:
        raise RowFault(fault.reason, fault.detail, where=origin.where) from None


class _Fields:
    """The parts of one row, by their roles."""

    def __init__(self, row: Row, names: Mapping[str, tuple[str, ...]]) -> None:
        self._row, self._names = row, names

    def get(self, part: str) -> Any:
        return value_of(self._row, part, self._names)

    def needed(self, part: str) -> Any:
        value = self.get(part)
        if value is not None:
            return value
        column = column_of(self._row, part, self._names)
        if column is not None:
            raise RowFault("null field", f"{column!r} is null")
        raise RowFault("missing field", f"the row has no {self._names[part][0]!r} (its columns: {', '.join(self._row) or 'none'})")

    def text(self, part: str) -> str:
        return _text(self.needed(part), column_of(self._row, part, self._names) or part)

    def number(self, part: str) -> float | None:
        value = self.get(part)
        if value is None:
            return None
        number = _number(value, part)
        if number < 0 or math.isinf(number):
            raise RowFault("number out of range", f"{part!r} is {number:g}")
        return number

    @property
    def weight(self) -> float:
        weight = self.number("weight")
        if weight == 0:
            raise RowFault("number out of range", "'weight' is 0: leave out a row that shall not count")
        return 1.0 if weight is None else weight

    def prompt(self) -> Prompt:
        """Text, or turns that do not end with the assistant's."""
        value = self.get("prompt")
        if value is None and self.get("messages") is not None:
            value = self.get("messages")
        if isinstance(value, list):
            return _not_empty_turns(messages_of(value, "the prompt"))
        prompt = self.text("prompt")
        if not prompt.strip():
            raise RowFault("empty prompt", "the prompt is empty")
        return prompt


def messages_of(value: Any, name: str) -> tuple[Message, ...]:
    """The turns of a chat: roles are text, text parts are joined, null keys (Arrow writes them) are left out.

    Raises:
        RowFault: no list of `{"role", "content"}` objects, or content that is not text.
    """
    if not isinstance(value, list) or not value:
        raise RowFault("wrong type", f"{name} is no list of messages")
    return tuple(_message(message, f"message {i + 1} of {name}") for i, message in enumerate(value))


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
        raise RowFault("wrong type", f'{name} is no {{"role": …, "content": …}} object')
    given = {key: value for key, value in message.items() if value is not None}
    content = given.get("content", "" if given.get("tool_calls") else None)
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    if content is None:
        raise RowFault("null field", f"{name} has no content")
    return given | {"content": _text(content, f"the content of {name}")}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowFault("wrong type", f"{name!r} is {type(value).__name__}, not text")
    return value


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise RowFault("wrong type", f"{name!r} is {_short(value)}, not a number")
    try:
        return float(value)
    except OverflowError:
        raise RowFault("number out of range", f"{name!r} is a whole number that is too large") from None


def _short(value: Any) -> str:
    """For a message; a whole number of thousands of digits has no text."""
    try:
        text = repr(value)
    except ValueError:
        text = "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}…"


def _not_empty_turns(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    if turns[-1]["role"] == "assistant":
        raise RowFault("nothing to answer", "the prompt ends with the assistant's turn")
    if not turns[-1]["content"].strip():
        raise RowFault("empty prompt", "the last turn of the prompt is empty")
    return turns


def _completion(text: str, name: str) -> str:
    if not text.strip():
        raise RowFault("empty completion", f"the {name} is empty")
    return text


def _final(turns: tuple[Message, ...], name: str) -> tuple[tuple[Message, ...], str]:
    """Turns before the last, and the last assistant turn's text."""
    if turns[-1]["role"] != "assistant":
        raise RowFault("no final assistant turn", f"{name} ends with the turn of {turns[-1]['role']!r}")
    if not turns[-1]["content"].strip() and not turns[-1].get("tool_calls"):
        raise RowFault("empty final turn", f"the last assistant turn of {name} is empty")
    return turns[:-1], turns[-1]["content"]


def _prompt_only(fields: _Fields, origin: Origin) -> PromptOnly:
    turns = fields.get("turns") if fields.get("prompt") is None and fields.get("messages") is None else None
    if turns is None:
        return PromptOnly(fields.prompt(), origin, weight=fields.weight)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise RowFault("wrong type", "'turns' is no list of the user's texts")
    return PromptOnly(turns[0], origin, tuple(turns[1:]), fields.weight)


def _demonstration(fields: _Fields, origin: Origin) -> Demonstration:
    if fields.get("instances") is not None:
        return _instance(fields, origin)
    prompt = fields.prompt()
    given = fields.needed("completion")
    if isinstance(prompt, str) and isinstance(given, str):
        return Demonstration(_with_input(prompt, fields.get("input")), _completion(given, "completion"), origin, weight=fields.weight)
    before = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    turns = (
        messages_of(given, "the completion") if isinstance(given, list) else ({"role": "assistant", "content": fields.text("completion")},)
    )
    return _dialogue((*before, *turns), fields, origin)


def _instance(fields: _Fields, origin: Origin) -> Demonstration:
    """Instruction and one `{"input", "output"}`, as self-instruct writes them."""
    instances = fields.get("instances")
    if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
        raise RowFault("wrong type", "'instances' is no list of objects")
    if len(instances) > 1:
        raise RowFault("several instances", f"the row has {len(instances)} instances")
    output = instances[0].get("output")
    if output is None:
        raise RowFault("missing field", "the instance has no 'output'")
    prompt = _with_input(fields.text("prompt"), instances[0].get("input"))
    return Demonstration(prompt, _completion(_text(output, "output"), "output"), origin, weight=fields.weight)


def _with_input(prompt: str, given: Any) -> str:
    return f"{prompt}\n\n{_text(given, 'input')}" if given else prompt


def _messages(fields: _Fields, origin: Origin) -> Demonstration:
    return _dialogue(messages_of(fields.needed("messages"), "the dialogue"), fields, origin)


def _dialogue(turns: tuple[Message, ...], fields: _Fields, origin: Origin) -> Demonstration:
    before, completion = _final(turns, "the dialogue")
    if not before:
        raise RowFault("empty prompt", "the dialogue has no turn before the assistant's")
    if before[-1]["role"] == "user" and not before[-1]["content"].strip():
        raise RowFault("empty prompt", "the user's last turn is empty")
    return Demonstration(before, completion, origin, turns, fields.weight)


def _pair(fields: _Fields, origin: Origin) -> PreferencePair:
    given = {name: fields.needed(name) for name in ("chosen", "rejected")}
    if all(isinstance(value, str) for value in given.values()):
        has_prompt = fields.get("prompt") is not None or fields.get("messages") is not None
        prompt: Prompt = fields.prompt() if has_prompt else ""
        answers = {name: _completion(text, name) for name, text in given.items()}
    else:
        prompt, answers = _chat_pair(fields, given)
    return _preference(prompt, answers["chosen"], answers["rejected"], fields, origin)


def _chat_pair(fields: _Fields, given: Mapping[str, Any]) -> tuple[Prompt, dict[str, str]]:
    """Answers as messages: the answer's alone after a prompt, or each a whole dialogue, whose turns before the last must agree."""
    dialogues = {name: messages_of(value, name) for name, value in given.items()}
    ends = {name: _final(turns, name) for name, turns in dialogues.items()}
    before = ends["chosen"][0]
    if before != ends["rejected"][0]:
        raise RowFault("prompts differ", "the turns before the last assistant turn differ between chosen and rejected")
    answers = {name: text for name, (_, text) in ends.items()}
    if fields.get("prompt") is None and not before:
        shared = fields.prompt()  # `messages`, or the fault that there is none
        return shared, answers
    if fields.get("prompt") is None:
        return _not_empty_turns(before), answers
    prompt = fields.prompt()
    if not before:
        return ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt, answers
    agrees = prompt == before if isinstance(prompt, tuple) else any(turn["content"] == prompt for turn in before)
    if not agrees:
        raise RowFault("prompts differ", "the prompt is not what stands before the last assistant turn")
    return _not_empty_turns(before), answers


def _transcript(fields: _Fields, origin: Origin) -> PreferencePair:
    parts = {}
    for name in ("chosen", "rejected"):
        before, marker, answer = fields.text(name).rpartition(ASSISTANT)
        if not marker:
            raise RowFault("no final assistant turn", f"{name} has no {ASSISTANT!r}")
        parts[name] = before, answer
    if parts["chosen"][0] != parts["rejected"][0]:
        raise RowFault("prompts differ", "the text before the last 'Assistant:' differs between chosen and rejected")
    for name, (_, answer) in parts.items():
        if not answer.strip():
            raise RowFault("empty final turn", f"the last assistant turn of {name} is empty")
    return _preference(parts["chosen"][0] + ASSISTANT, parts["chosen"][1], parts["rejected"][1], fields, origin)


def _preference(prompt: Prompt, chosen: str, rejected: str, fields: _Fields, origin: Origin) -> PreferencePair:
    if chosen == rejected:
        raise RowFault("chosen equals rejected", "chosen and rejected are the same text")
    p = fields.get("p")
    probability = None if p is None else _probability(p)
    return PreferencePair(prompt, chosen, rejected, origin, fields.number("margin"), probability, weight=fields.weight)


def _labelled(fields: _Fields, origin: Origin) -> PreferencePair:
    prompt = fields.prompt()
    a, b = (_completion(fields.text(name), name) for name in ("response_a", "response_b"))
    if a == b:
        raise RowFault("chosen equals rejected", "response_a and response_b are the same text")
    preferred, probability = _label(fields)
    chosen, rejected = (b, a) if preferred == "b" else (a, b)
    return PreferencePair(prompt, chosen, rejected, origin, fields.number("margin"), probability, preferred, fields.weight)


_OPTIONS: dict[str, Literal["a", "b", "tie"]] = {"a": "a", "b": "b", "tie": "tie"}


def _label(fields: _Fields) -> tuple[Literal["a", "b", "tie"], float | None]:
    """The preferred place, and the probability that it is the better one (None for a hard label)."""
    p = fields.get("p")
    if p is None:
        label = fields.needed("label")
        option = _OPTIONS.get(label.strip().lower()) if isinstance(label, str) else None
        if option is None:
            raise RowFault("label outside the options", f"the label is {_short(label)}, not a, b or tie")
        return option, 0.5 if option == "tie" else None
    probability = _probability(p)
    preferred: Literal["a", "b", "tie"] = "tie" if probability == 0.5 else "a" if probability > 0.5 else "b"
    return preferred, max(probability, 1 - probability)


def _probability(p: Any) -> float:
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise RowFault("label outside the options", f"p is {_short(p)}, not a probability between 0 and 1")
    return float(p)


def _ranking(fields: _Fields, origin: Origin) -> Ranking:
    prompt = fields.prompt()
    answers = _answers(fields.needed("answers"))
    part = "scores" if fields.get("ranks") is None and fields.get("scores") is not None else "ranks"
    values = fields.needed(part)
    if not isinstance(values, list) or len(values) != len(answers):
        raise RowFault("ranks and answers differ in number", f"{part} does not give one number to each of the {len(answers)} answers")
    numbers = [_number(value, part) for value in values]
    if not all(map(math.isfinite, numbers)):
        raise RowFault("number out of range", f"an infinite number among the {part}")
    if len(set(numbers)) < len(numbers):
        raise RowFault("ties in the ranking", f"two answers have the same of {part}: {_short(values)}")
    order = sorted(range(len(answers)), key=lambda i: numbers[i], reverse=part == "scores")
    best_first = tuple(numbers[i] for i in order)
    ranks = best_first if part == "ranks" else tuple(float(rank + 1) for rank in range(len(order)))
    return Ranking(
        prompt, tuple(answers[i] for i in order), ranks, origin, best_first if part == "scores" else None, tuple(order), fields.weight
    )


def _answers(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise RowFault("wrong type", "the answers are no list")
    answers = [_completion(_text(answer, f"answer {i + 1}"), f"answer {i + 1}") for i, answer in enumerate(value)]
    if len(answers) < 2:
        raise RowFault("one answer", f"the ranking has {len(answers)} answers")
    if len(set(answers)) < len(answers):
        raise RowFault("equal answers", "two answers are the same text")
    return answers


_PARSERS: dict[Layout, Callable[[_Fields, Origin], Record]] = {
    "prompts": _prompt_only,
    "demonstrations": _demonstration,
    "messages": _messages,
    "pairs": _pair,
    "transcripts": _transcript,
    "rankings": _ranking,
    "labelled": _labelled,
}
