"""`data`: one file or several, nothing silent about long prompts."""

import pytest
from pydantic import ValidationError

from rlhf_dist.config.data import DataSection


def test_one_file_name_stands_for_a_list_of_one():
    section = DataSection(train="prompts.jsonl", eval="held_out.csv.gz")
    assert section.train == ["prompts.jsonl"] and section.eval == ["held_out.csv.gz"]


def test_an_overlong_prompt_is_an_error_unless_asked_otherwise():
    assert DataSection(train="a.jsonl").overlong == "error"


@pytest.mark.parametrize(
    "changes",
    [
        {"train": []},
        {"eval_fraction": 1.0},
        {"eval_fraction": -0.1},
        {"max_prompt_tokens": 0},
        {"overlong": "truncate"},
        {"shuffle_buffer": -1},
    ],
)
def test_ranges(changes):
    with pytest.raises(ValidationError, match=next(iter(changes))):
        DataSection(**{"train": ["a.jsonl"], **changes})


def test_training_files_are_needed():
    with pytest.raises(ValidationError, match="train"):
        DataSection()  # type: ignore[call-arg]
