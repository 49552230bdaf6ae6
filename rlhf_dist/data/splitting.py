"""Train and held-out rows, split by the prompt: equal prompts, whatever their spacing and case, never cross.

Which side a prompt falls on is a hash of its text alone, so nothing has to be remembered, and other files with the same prompts
are cut in the same way.
"""

from __future__ import annotations

import unicodedata
from typing import Literal

from rlhf_dist.data.layouts import PreferencePair, Prompt, Record
from rlhf_dist.data.prompts import held_out

Split = Literal["train", "eval"]


def normalised(text: str) -> str:
    """Text as it is compared: Unicode NFKC, case folded, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text: text as it is, a single user turn as its content, a dialogue as `role: content` lines."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0]["role"] == "user":
        return str(prompt[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def split_key(record: Record) -> str:
    """What a record is split by: its prompt, normalised; a pair without a prompt goes by both its texts."""
    if isinstance(record, PreferencePair) and not record.prompt:
        return normalised(f"{record.chosen}\n{record.rejected}")
    return normalised(prompt_text(record.prompt))


def side(record: Record, fraction: float, seed: int = 0) -> Split:
    """The split of a record.

    Args:
        fraction: share of the prompts held out.
        seed: another one cuts otherwise; 0 is what the readers use with their `eval_fraction`.
    """
    key = split_key(record)
    return "eval" if held_out(f"{seed}\0{key}" if seed else key, fraction) else "train"
