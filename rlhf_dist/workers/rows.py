"""The rows of a supervised stage: train and held-out side of its files, encoded, with every row that was dropped or cut counted."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.supervised import RowsSection
from rlhf_dist.data.answers import AnswersEncoder, AnswersRow, fitted
from rlhf_dist.data.chat import RefusedChat
from rlhf_dist.data.faults import RowFault
from rlhf_dist.data.layouts import PreferencePair, Ranking
from rlhf_dist.data.preferences import PreferenceReader
from rlhf_dist.data.reading import ReadOptions, RecordReader
from rlhf_dist.data.splitting import Split, split_key
from rlhf_dist.data.token_rows import TokenRow
from rlhf_dist.data.validation import ErrorPolicy
from rlhf_dist.workers.supervised import Rows

Encode = Callable[[Any, Counter[str]], Any]
"""Makes a row of a record, or None; what was dropped or cut is counted by reason."""


LOOK_ROWS = 256
"""Rows of each file that are looked at before a run."""


def read_rows(section: RowsSection, reader: Callable[[list[str], ReadOptions], RecordReader], encode: Encode) -> Rows:
    """Reads and encodes both sides.

    Raises:
        UserError: a faulty row where the config says `error`, or none left.
    """
    fates, eval_fates = Counter[str](), Counter[str]()
    train = reader(section.train, _options(section, "train"))
    rows, held_out = list(_encoded(train, encode, section.faults, fates)), list[Any]()
    fates.update(_faults(train))
    if section.eval or section.eval_fraction:
        other = reader(section.eval or section.train, _options(section, "eval"))
        held_out = list(_encoded(other, encode, section.faults, eval_fates))
        eval_fates.update(_faults(other) if section.eval else {})  # the same file has the same faults, counted once
    return Rows(rows, held_out, dict(fates + eval_fates), dict(eval_fates))


def look_at_rows(section: RowsSection, reader: Callable[[list[str], ReadOptions], RecordReader], encode: Encode) -> int:
    """Reads and encodes the first rows of every file as the run will, and keeps none; returns how many.

    Raises:
        UserError: a row that the run would stop at.
    """
    count = 0
    for path in [*section.train, *section.eval]:
        records: Any = reader([path], ReadOptions(section.faults))
        for record in itertools.islice(records, LOOK_ROWS):
            count += 1
            with refusals(section.faults, Counter()):
                encode(record, Counter())
    return count


def preference_rows(section: RowsSection, encoder: AnswersEncoder, *, as_pairs: bool, pad: int | None = None) -> Rows:
    """Preferences as `AnswersRow`; rankings whole, or as their pairs. Answers of equal tokens teach nothing: they are dropped and counted.

    Args:
        pad: id of a token that no row may hold: a row whose text spells it is a fault.

    Raises:
        UserError: as `read_rows`.
    """
    return read_rows(section, _preferences(as_pairs), _preference_encode(section, encoder, pad))


def look_at_preferences(section: RowsSection, encoder: AnswersEncoder, *, as_pairs: bool, pad: int | None = None) -> int:
    """The look before `preference_rows`, at the first rows of every file; returns how many.

    Raises:
        UserError: a row that the run would stop at.
    """
    return look_at_rows(section, _preferences(as_pairs), _preference_encode(section, encoder, pad))


def _preferences(as_pairs: bool) -> Callable[[list[str], ReadOptions], PreferenceReader]:
    return lambda files, options: PreferenceReader(files, options, rankings="pairs" if as_pairs else "keep")


def _preference_encode(section: RowsSection, encoder: AnswersEncoder, pad: int | None) -> Encode:
    numbers: dict[str, int] = {}

    def encode(record: PreferencePair | Ranking, fates: Counter[str]) -> AnswersRow | None:
        texts = record.answers if isinstance(record, Ranking) else (record.chosen, record.rejected)
        where = record.origin.where
        whole = [encoder.encode(record.prompt, text, where=where) for text in texts]
        if pad is not None and any(pad in row.tokens for row in whole):
            if section.faults == "error":
                raise spells_pad(where)
            fates["dropped: holds the pad token"] += 1
            return None
        answers, fate = fitted(whole, section.max_tokens, section.overlong, where, encoder.bos)
        reason = _teaches_nothing(answers) if answers else ""
        fates.update([reason or fate] if reason or fate else [])
        if reason or not answers:
            return None
        pair = record if isinstance(record, PreferencePair) else None
        return AnswersRow(
            answers,
            numbers.setdefault(split_key(record), len(numbers)),
            record.origin.source,
            pair.margin if pair else None,
            pair.label_probability if pair else None,
            record.weight,
            record.origin,
        )

    return encode


@contextmanager
def refusals(faults: ErrorPolicy, fates: Counter[str]) -> Iterator[None]:
    """A row that the chat template refuses within the block is a fault as any other: it stops, or is left out and counted in `fates`.

    Raises:
        UserError: it is refused, where `faults` is `error`.
    """
    try:
        yield
    except RefusedChat as refused:
        fault = RowFault("refused by the chat template", refused.what, where=refused.where)
        if faults == "error":
            raise fault.as_error() from None
        fates[f"dropped: {fault.reason}"] += 1


def spells_pad(where: str) -> UserError:
    """What is said of a row that holds the pad token."""
    fix = "take the pad token out of the text, or set data.faults=drop, which leaves such rows out and counts them"
    return UserError("the row holds the pad token, at which a reward model would not read a score", where=where, fix=fix)


def _teaches_nothing(answers: Sequence[TokenRow]) -> str:
    """Why a row is dropped, or ""."""
    if not all(row.trained.any() for row in answers):
        return "dropped: an answer without a token"
    return "dropped: answers of the same tokens" if len({row.tokens.tobytes() for row in answers}) < len(answers) else ""


def _encoded(reader: Any, encode: Encode, faults: ErrorPolicy, fates: Counter[str]) -> Iterator[Any]:
    for record in reader:
        row = None
        with refusals(faults, fates):
            row = encode(record, fates)
        if row is not None:
            yield row


def _options(section: RowsSection, split: Split) -> ReadOptions:
    return ReadOptions(section.faults) if section.eval else ReadOptions(section.faults, split, section.eval_fraction)


def _faults(reader: RecordReader) -> dict[str, int]:
    return {f"dropped: {reason}": count for reason, count in reader.counts.dropped.items()}
