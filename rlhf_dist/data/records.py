"""One row into one prompt: which column, which text, which tokens, under which name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rlhf_dist.config.data import DataSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.data.chat import render_messages
from rlhf_dist.data.files import Row


@dataclass(frozen=True)
class PromptRecord:
    """A prompt ready for the model.

    prompt_id: 63 bits, the same in every run and on every machine as long as file name and row are.
    text: what the model is sent (for messages: the rendered template; after `truncate_left`: what is left of it).
    tokens: its token ids, special tokens included.
    columns: the other columns of the row, `messages` included. file, row (from 0): where it came from.
    skipped: rows dropped as too long just before it (the last of an epoch: also after it). truncated: whether it was cut.
    """

    prompt_id: int
    text: str
    tokens: tuple[int, ...]
    columns: dict[str, Any]
    file: str
    row: int
    skipped: int = 0
    truncated: bool = False


def columns_of(records: Sequence[PromptRecord]) -> dict[str, tuple[Any, ...]]:
    """The columns of several prompts, as rewards are given them: one entry a prompt, None where its row lacks the column."""
    names = dict.fromkeys(name for record in records for name in record.columns)
    return {name: tuple(record.columns.get(name) for record in records) for name in names}


def keep_end(tokens: tuple[int, ...], limit: int, bos: int | None) -> tuple[int, ...]:
    """The last `limit` tokens; a start token in front stays in front, for models lean on it."""
    if limit > 1 and bos is not None and tokens[0] == bos:
        return (bos, *tokens[len(tokens) - limit + 1 :])
    return tokens[-limit:]


@dataclass(frozen=True)
class SourceFile:
    """A file of a list; `name` tells files with one base name apart, and leaves folders out so that data may move."""

    path: str
    name: str

    def prompt_id(self, row: int) -> int:
        """Stable 63-bit hash of name and row."""
        return stable_hash(f"{self.name}\0{row}") >> 1


def source_files(paths: Sequence[str]) -> tuple[SourceFile, ...]:
    """Names the files of a list: their base name, and the ordinal where a base name comes again."""
    bases = [Path(path).name for path in paths]
    ordinals = [bases[:i].count(base) for i, base in enumerate(bases)]
    return tuple(SourceFile(path, f"{base}\0{n}" if n else base) for path, base, n in zip(paths, bases, ordinals, strict=True))


def stable_hash(text: str) -> int:
    """64 bits of blake2b: the same everywhere, unlike `hash`."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


class PromptReader:
    """Takes the prompt out of a row and tokenises it, by the rules of the `data` section."""

    def __init__(self, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._prompt_field, self._messages_field = section.prompt_field, section.messages_field
        self._limit, self._overlong = section.max_prompt_tokens, section.overlong

    def text(self, row: Row, where: str) -> tuple[str, dict[str, Any], bool]:
        """Prompt text, the other columns, and whether a chat template made the text.

        Raises:
            UserError: neither prompt nor messages, or one that is empty or of a wrong type.
        """
        prompt = row.get(self._prompt_field)
        columns = {key: value for key, value in row.items() if key != self._prompt_field}
        if prompt is None and row.get(self._messages_field) is not None:
            return render_messages(row[self._messages_field], self._tokenizer, where=where), columns, True
        if prompt is None:
            raise self._no_prompt(row, where)
        if not isinstance(prompt, str):
            raise UserError(
                f"the prompt is {type(prompt).__name__}, not text", where=where, fix=f"make {self._prompt_field!r} a string in every row"
            )
        if not prompt:
            raise UserError("the prompt is empty", where=where, fix="give it text, or remove the row")
        return prompt, columns, False

    def tokens(self, text: str, *, templated: bool, where: str) -> tuple[int, ...]:
        """Token ids; the tokenizer's own special tokens are added to plain text only, a template already has them.

        Raises:
            UserError: the text gives no tokens.
        """
        ids = self._tokenizer(text, add_special_tokens=not templated, return_attention_mask=False, verbose=False)["input_ids"]
        if not ids:
            raise UserError("the prompt has no tokens", where=where, fix="give it text that the tokenizer knows, or remove the row")
        return tuple(ids)

    def fit(self, text: str, tokens: tuple[int, ...], where: str) -> tuple[str, tuple[int, ...], Literal["fits", "dropped", "truncated"]]:
        """Applies `data.overlong` to a prompt.

        Raises:
            UserError: the prompt is longer than the limit and the policy is `error`.
        """
        if len(tokens) <= self._limit:
            return text, tokens, "fits"
        if self._overlong == "error":
            raise UserError(
                f"the prompt has {len(tokens)} tokens; data.max_prompt_tokens is {self._limit}",
                where=where,
                fix="raise data.max_prompt_tokens, or set data.overlong to drop or truncate_left",
            )
        if self._overlong == "drop":
            return text, tokens, "dropped"
        kept = keep_end(tokens, self._limit, self._tokenizer.bos_token_id)
        shown = kept[1:] if kept[0] == self._tokenizer.bos_token_id else kept  # the text of a whole prompt has no start token either
        return str(self._tokenizer.decode(list(shown), skip_special_tokens=False)), kept, "truncated"

    def _no_prompt(self, row: Row, where: str) -> UserError:
        fields = f"{self._prompt_field!r} nor {self._messages_field!r}"
        null = [field for field in (self._prompt_field, self._messages_field) if field in row]
        what = f"{null[0]!r} is null" if null else f"the row has neither {fields} (its columns: {', '.join(row) or 'none'})"
        return UserError(what, where=where, fix="give the row a prompt, or name its column in data.prompt_field or data.messages_field")
