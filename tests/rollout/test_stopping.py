"""Stop tokens, stop strings on a byte-level decoder, length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.config.errors import UserError
from rlhf_dist.contracts.experience import StopReason
from rlhf_dist.rollout.sampling import SamplingParams
from rlhf_dist.rollout.stopping import StopRule


def decode_bytes(tokens: Sequence[int]) -> str:
    """Token = byte; half a character shows as U+FFFD, and a leading space is dropped, as sentencepiece does."""
    text = bytes(tokens).decode(errors="replace")
    return text.removeprefix(" ")


def end_of(text: str, params: SamplingParams) -> tuple[int, StopReason | None]:
    """Feeds the bytes of a text one by one; how many were taken and why it ended."""
    rule, taken = StopRule(params, decode_bytes), []
    for byte in text.encode():
        taken.append(byte)
        reason = rule.reason(taken, params.max_new_tokens)
        if reason is not None:
            return len(taken), reason
    return len(taken), None


def test_any_of_several_stop_tokens_ends_the_completion() -> None:
    rule = StopRule(SamplingParams(10, stop_tokens=(1, 2)), None)
    assert [rule.reason([5, token], 10) for token in (1, 2, 3)] == [StopReason.STOP_TOKEN, StopReason.STOP_TOKEN, None]
    assert rule.reason([1, 5], 10) is None


def test_length_ends_it_and_a_stop_token_in_the_last_place_is_named_first() -> None:
    rule = StopRule(SamplingParams(2, stop_tokens=(1,)), None)
    assert rule.reason([5, 6], 2) is StopReason.LENGTH
    assert rule.reason([5, 1], 2) is StopReason.STOP_TOKEN
    assert rule.reason([5], 1) is StopReason.LENGTH


@pytest.mark.parametrize(
    ("text", "stop", "taken"),
    [
        ("yes. Human: no", ("Human:",), 11),
        ("a\n\nb", ("\n\n",), 3),
        ("ééé", ("éé",), 4),
        ("one two", ("zzz", "e t"), 5),
        ("ends ", ("s ",), 5),
        ("x" * 90 + "stop", ("stop",), 94),
    ],
)
def test_the_token_that_completes_the_string_is_the_last(text: str, stop: tuple[str, ...], taken: int) -> None:
    assert end_of(text, SamplingParams(200, stop_strings=stop)) == (taken, StopReason.STOP_STRING)


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab é\n", max_size=40), stop=st.lists(st.text("ab é\n", min_size=1, max_size=4), min_size=1, max_size=2))
def test_tail_and_shortcut_agree_with_decoding_everything(text: str, stop: list[str]) -> None:
    text = "." + text  # the decoder drops a leading space of the whole text too: that space is not part of the completion's text
    encoded = text.encode()
    full = next((n for n in range(1, len(encoded) + 1) if any(s in decode_bytes(encoded[:n]) for s in stop)), None)
    taken, reason = end_of(text, SamplingParams(1000, stop_strings=tuple(stop)))
    assert (taken, reason) == ((full, StopReason.STOP_STRING) if full else (len(encoded), None))


def test_tokens_that_cannot_complete_a_string_do_not_decode_the_tail() -> None:
    longest = 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode_bytes(tokens)

    rule = StopRule(SamplingParams(100, stop_strings=("!",)), decode)
    for end in range(1, 20):
        assert rule.reason(list(b"abcdefghijklmnopqrst")[:end], 100) is None
    assert longest == 1
    assert rule.reason(list(b"abcdefghijklmn!"), 100) is StopReason.STOP_STRING and longest > 1


def test_stop_strings_without_decode_are_refused() -> None:
    with pytest.raises(UserError, match="tokenizer"):
        StopRule(SamplingParams(1, stop_strings=("x",)), None)


@pytest.fixture(scope="module")
def bytes_of_sentencepiece() -> Any:
    """256 byte tokens: a run of them that is not UTF-8 as a whole shows as so many U+FFFD, as Llama's tokenizer shows it."""
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def test_a_tail_that_reads_as_text_once_its_head_is_lost_does_not_stop(bytes_of_sentencepiece: Any) -> None:
    def decode(tokens: Sequence[int]) -> str:
        return str(bytes_of_sentencepiece.decode(list(tokens)))

    broken, sound = list(b"\xc3abcdefghijklmn!"), list("éabcdefghijklmn!".encode())
    assert "!" in decode(broken[-8:]) and "!" not in decode(broken), "else this test shows nothing"
    rule = StopRule(SamplingParams(100, stop_strings=("!",)), decode)
    assert [rule.reason(broken[:end], 100) for end in range(1, len(broken) + 1)] == [None] * len(broken)
    assert [rule.reason(sound[:end], 100) for end in range(1, len(sound))] == [None] * (len(sound) - 1)
    assert rule.reason(sound, 100) is StopReason.STOP_STRING
