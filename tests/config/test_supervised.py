"""Sections of the supervised stages."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from rlhf_dist.config.supervised import RowsSection, TrainingSection


def test_one_file_is_a_list() -> None:
    section = RowsSection(train="a.jsonl", eval="b.jsonl")  # type: ignore[arg-type]
    assert (section.train, section.eval, section.overlong, section.faults) == (["a.jsonl"], ["b.jsonl"], "error", "error")


@pytest.mark.parametrize(
    "values", [{"train": []}, {"train": "a", "eval_fraction": 1.0}, {"train": "a", "overlong": "cut"}, {"train": "a", "max_tokens": 1}]
)
def test_what_makes_no_sense_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RowsSection.model_validate(values)


def test_training_counts_from_one() -> None:
    assert TrainingSection().epochs == 1
    for name in ("epochs", "batch_size", "max_steps", "max_skipped"):
        with pytest.raises(ValidationError):
            TrainingSection.model_validate({name: 0})


def test_capsules_may_be_none() -> None:
    assert TrainingSection().capsules == 2 and TrainingSection(capsules=0).capsules == 0
    with pytest.raises(ValidationError):
        TrainingSection(capsules=-1)
