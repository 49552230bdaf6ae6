"""When a completion ends: stop tokens, stop strings, length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import StopReason
from rlhf_dist.rollout.sampling import SamplingParams

Decode = Callable[[Sequence[int]], str]

BYTES_PER_CHARACTER = 4
MARGIN = 4
"""Tokens decoded before the longest possible match: some decoders drop the space at the start of what they are given."""


class StopRule:
    """Decides after every token whether a completion ends there.

    Args:
        params: stop tokens and stop strings.
        decode: token ids to text; needed with stop strings.

    Raises:
        UserError: stop strings without `decode`.
    """

    def __init__(self, params: SamplingParams, decode: Decode | None) -> None:
        if params.stop_strings and decode is None:
            raise UserError(
                "stop_strings need a tokenizer to decode with", where="rollout.stop_strings", fix="remove them, or pass `decode`"
            )
        self._stop_tokens = frozenset(params.stop_tokens)
        self._stop_strings = params.stop_strings
        self._decode = decode
        # A token that shows as text stands for at least one byte, so a match never reaches back further than this.
        self._tail = BYTES_PER_CHARACTER * max(map(len, self._stop_strings), default=0) + MARGIN
        self._last_characters = {text[-1] for text in self._stop_strings}
        self._may_complete: dict[int, bool] = {}

    def reason(self, tokens: Sequence[int], limit: int) -> StopReason | None:
        """Why the completion ends with its last token, or None. A stop token is named before a stop string, a string before the length."""
        if tokens[-1] in self._stop_tokens:
            return StopReason.STOP_TOKEN
        if self._decode is not None and self._stop_strings and self._completes_a_string(tokens, self._decode):
            return StopReason.STOP_STRING
        return StopReason.LENGTH if len(tokens) >= limit else None

    def _completes_a_string(self, tokens: Sequence[int], decode: Decode) -> bool:
        if not self._candidate(tokens[-1], decode):
            return False
        text = decode(tokens[-self._tail :])
        if not any(wanted in text for wanted in self._stop_strings):
            return False
        # Bytes that are no text as a whole may read as text once the tail has lost their head: what counts is the completion.
        whole = decode(tokens)
        return any(wanted in whole for wanted in self._stop_strings)

    def _candidate(self, token: int, decode: Decode) -> bool:
        """Whether this token could be the last of a stop string; spares decoding the tail after every token.

        Only a token that decodes on its own to clean text without the last character of any stop string is ruled out: one that shows
        nothing or half a character may complete anything, and a space may be lost when a token stands alone.
        """
        known = self._may_complete.get(token)
        if known is None:
            text = decode([token])
            unclear = not text or "�" in text or " " in self._last_characters
            known = self._may_complete[token] = unclear or any(character in text for character in self._last_characters)
        return known
