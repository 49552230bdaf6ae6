"""`data`: prompt files, their fields, and what happens to a prompt that is too long."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from rlhf_dist.config.section import Section


class DataSection(Section):
    """Prompts, as the user has them."""

    train: list[str] = Field(min_length=1, description="files of prompts: .jsonl, .parquet, .csv, .arrow, each also as .gz (jsonl, csv)")
    eval: list[str] = Field(default_factory=list, description="held-out files; empty: use `eval_fraction`")
    eval_fraction: float = Field(0.0, ge=0, lt=1, description="share of `train` held out, by a stable hash of the prompt text")
    prompt_field: str = Field("prompt", description="column with the prompt as text")
    messages_field: str = Field("messages", description="column with a chat, used where `prompt_field` is absent")
    max_prompt_tokens: int = Field(512, ge=1, description="longest prompt, in tokens of the policy's tokenizer")
    overlong: Literal["error", "drop", "truncate_left"] = Field("error", description="what to do with a longer prompt; drops are counted")
    shuffle_buffer: int = Field(0, ge=0, description="rows held for shuffling while streaming; 0 keeps the order of the files")

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value
