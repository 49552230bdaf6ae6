"""What the supervised stages share: how long they train, and which rows they train on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from rlhf_dist.config.section import Section


class TrainingSection(Section):
    """Epochs, batches and evaluation of a supervised stage.

    An optimizer step whose loss or gradient is not finite is skipped on all ranks and written down as a capsule (`rlhf-dist replay`).
    """

    epochs: int = Field(1, ge=1, description="passes over the training rows, each in a fresh order")
    batch_size: int = Field(32, ge=1, description="rows in one optimizer step, over all ranks")
    max_steps: int | None = Field(None, ge=1, description="end after so many optimizer steps, even within an epoch")
    max_skipped: int = Field(
        3,
        ge=1,
        description="steps skipped in a row, because loss or gradient is not finite, that stop the run; fp16 overflows do not count",
    )
    capsules: int = Field(2, ge=0, description="skipped steps that a run writes down, each with the model's trained weights; 0: none")
    evaluate_every: int = Field(0, ge=0, description="optimizer steps between evaluations; 0: before, after each epoch, and at the end")

    def steps_per_epoch(self, rows: int) -> int:
        """Optimizer steps in one pass over the rows."""
        return -(-rows // self.batch_size)

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of the run, one at least: what the loop counts to and the learning-rate schedule spans."""
        steps = self.steps_per_epoch(rows) * self.epochs
        return max(1, min(steps, self.max_steps or steps))


class RowsSection(Section):
    """Rows of a supervised stage, and what happens to those that do not fit."""

    train: list[str] = Field(min_length=1, description="files: .jsonl, .parquet, .csv, .arrow, each also as .gz (jsonl, csv)")
    eval: list[str] = Field(default_factory=list, description="held-out files; empty: use `eval_fraction`")
    eval_fraction: float = Field(0.0, ge=0, lt=1, description="share of `train` held out, by a stable hash of the prompt: none leaks")
    max_tokens: int = Field(1024, ge=2, description="longest row, prompt and completion together")
    overlong: Literal["error", "drop", "truncate"] = Field(
        "error",
        description="a longer row: stop, drop, or cut (a demonstration at its end, answers at the front of their prompt); counted",
    )
    faults: Literal["error", "drop"] = Field(
        "error", description="a row that cannot be used: stop with file, line and reason, or drop and count it"
    )

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value
