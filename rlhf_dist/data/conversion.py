"""From one layout to another, row by row; columns that no layout reads travel along.

| to | from | the row becomes |
|---|---|---|
| prompts | all | the prompt alone |
| demonstrations | all but prompts | prompt + completion: of a pair the chosen answer, of a ranking the best |
| pairs | pairs, transcripts, rankings, labelled | prompt + chosen + rejected; a ranking gives all its C(K, 2) pairs |
| messages | all | the same record with its prompt as turns; demonstrations become whole dialogues, transcripts are cut at `Human:` |
| transcripts | all preferences | chosen + rejected as whole texts, "\\n\\nHuman: … \\n\\nAssistant: …" |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from rlhf_dist.config.errors import UserError
from rlhf_dist.data.files import Row
from rlhf_dist.data.layouts import (
    ASSISTANT,
    HUMAN,
    NAMES,
    Demonstration,
    Message,
    PreferencePair,
    Prompt,
    PromptOnly,
    Ranking,
    Record,
    other_columns,
)
from rlhf_dist.data.validation import TypedRow

Target = Literal["prompts", "demonstrations", "pairs", "messages", "transcripts"]
TARGETS: tuple[Target, ...] = ("prompts", "demonstrations", "pairs", "messages", "transcripts")

_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def converted(rows: Iterable[tuple[TypedRow, Record]], target: Target, names: Mapping[str, tuple[str, ...]] = NAMES) -> Iterator[Row]:
    """Rows of the target layout, in order.

    Args:
        rows: good rows and their records, as `validation.accepted` gives them.
        target: the layout to make.
        names: what the parts may be called in the rows, so that the other columns are known.

    Raises:
        UserError: a record that cannot become one of the target.
    """
    for typed, record in rows:
        others = other_columns(typed.row, typed.layout, names)
        for made in _MAKERS[target](record):
            yield made | {name: value for name, value in others.items() if name not in made}


def transcript_turns(text: str) -> tuple[Message, ...]:
    """The turns of a "\\n\\nHuman: … \\n\\nAssistant: …" text, stripped; what stands before the first one is the system's.

    An empty last turn of the assistant (a prompt ends with "\\n\\nAssistant:") is no turn.
    """
    pieces = _TURN.split(text)
    turns = [{"role": _SPEAKERS[speaker], "content": said.strip()} for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True)]
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    system = [{"role": "system", "content": pieces[0].strip()}] if pieces[0].strip() else []
    return (*system, *turns)


def as_turns(prompt: Prompt) -> tuple[Message, ...]:
    """A prompt as turns: a transcript is cut into its own, other text is one turn of the user."""
    if not isinstance(prompt, str):
        return prompt
    turns = transcript_turns(prompt) if prompt.endswith(ASSISTANT) else ()
    return turns or ({"role": "user", "content": prompt},)


def as_transcript(prompt: Prompt) -> str:
    """A prompt as a transcript up to its last "\\n\\nAssistant:".

    Raises:
        ValueError: a turn of another role than user, assistant or (first) system.
    """
    if isinstance(prompt, str):
        return prompt if prompt.endswith(ASSISTANT) else f"{HUMAN} {prompt}{ASSISTANT}"
    text = ""
    for i, turn in enumerate(prompt):
        if turn["role"] == "system" and i == 0:
            text = turn["content"]
        elif turn["role"] in ("user", "assistant"):
            text += f"{HUMAN if turn['role'] == 'user' else ASSISTANT} {turn['content']}"
        else:
            raise ValueError(f"a transcript has no turn of {turn['role']!r}")
    return text + ASSISTANT


def _prompts(record: Record) -> Iterator[Row]:
    follow_ups = {"follow_ups": list(record.follow_ups)} if isinstance(record, PromptOnly) and record.follow_ups else {}
    yield _prompt_columns(_prompt_of(record)) | follow_ups


def _demonstrations(record: Record) -> Iterator[Row]:
    prompt = _prompt_of(record)  # turns stay under `prompt`: `messages` beside a completion would read as a whole dialogue
    yield {"prompt": prompt if isinstance(prompt, str) else list(prompt), "completion": _best_answer(record)}


def _pairs(record: Record) -> Iterator[Row]:
    for pair in _as_pairs(record, "pairs"):
        yield {**_prompt_columns(pair.prompt), "chosen": pair.chosen, "rejected": pair.rejected, **_strength(pair)}


def _messages(record: Record) -> Iterator[Row]:
    turns = list(as_turns(_prompt_of(record)))
    if isinstance(record, PromptOnly):
        yield {"messages": turns}
    elif isinstance(record, Demonstration):
        final = {"role": "assistant", "content": record.completion}
        yield {"messages": list(record.turns) or [*turns, final | {"content": _bare(record.prompt, record.completion)}]}
    elif isinstance(record, Ranking):
        numbers = {"ranks": list(record.ranks)} if record.scores is None else {"scores": list(record.scores)}
        yield {"messages": turns, "answers": list(record.answers), **numbers}
    else:
        answers = {name: _bare(record.prompt, text) for name, text in (("chosen", record.chosen), ("rejected", record.rejected))}
        yield {"messages": turns, **answers, **_strength(record)}


def _transcripts(record: Record) -> Iterator[Row]:
    for pair in _as_pairs(record, "transcripts"):
        try:
            prompt = as_transcript(_prompt_of(pair))
        except ValueError as error:
            raise UserError(str(error), where=pair.origin.where, fix="convert to messages instead") from None
        whole = pair.prompt == prompt  # the answers of a transcript have their space already
        texts = {name: prompt + ("" if whole else " ") + text for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected))}
        yield {**texts, **_strength(pair)}


def _bare(prompt: Prompt, answer: str) -> str:
    """An answer as a turn's content: that of a transcript loses the space after `Assistant:`."""
    return answer.strip() if isinstance(prompt, str) and prompt.endswith(ASSISTANT) else answer


def _prompt_columns(prompt: Prompt) -> dict[str, Any]:
    if not isinstance(prompt, str):
        return {"messages": list(prompt)}
    return {"prompt": prompt} if prompt else {}


def _prompt_of(record: Record) -> Prompt:
    if not record.prompt:
        raise UserError("the pair has no prompt", where=record.origin.where, fix="only pairs can be made of pairs without prompts")
    return record.prompt


def _strength(pair: PreferencePair) -> dict[str, Any]:
    return {name: value for name, value in (("margin", pair.margin), ("p", pair.label_probability)) if value is not None}


def _best_answer(record: Record) -> str:
    if isinstance(record, Demonstration):
        return record.completion
    if isinstance(record, PreferencePair):
        return record.chosen
    if isinstance(record, Ranking):
        return record.answers[0]
    raise UserError("a prompt without an answer is no demonstration", where=record.origin.where, fix="convert to prompts or messages")


def _as_pairs(record: Record, target: str) -> list[PreferencePair]:
    if isinstance(record, PreferencePair):
        return [record]
    if isinstance(record, Ranking):
        return record.pairs()
    raise UserError(
        f"a row with {'one answer' if isinstance(record, Demonstration) else 'no answer'} cannot become one of {target}",
        where=record.origin.where,
        fix="give preferences: chosen and rejected, ranked answers or labelled responses",
    )


_MAKERS: dict[Target, Callable[[Record], Iterator[Row]]] = {
    "prompts": _prompts,
    "demonstrations": _demonstrations,
    "pairs": _pairs,
    "messages": _messages,
    "transcripts": _transcripts,
}
