"""`run`: a name that is a folder name, a seed that fits 63 bits."""

import pytest
from pydantic import ValidationError

from rlhf_dist.config.run import RunSection


def test_defaults():
    section = RunSection()
    assert (section.name, section.output_dir, section.overwrite, section.seed, section.steps) == ("ppo", "runs", False, 0, 100)


@pytest.mark.parametrize("name", ["a/b", "..\\x", "with space", ""])
def test_a_name_that_is_no_folder_name_is_refused(name):
    with pytest.raises(ValidationError, match="name"):
        RunSection(name=name)


@pytest.mark.parametrize("changes", [{"seed": -1}, {"seed": 2**63}, {"steps": 0}, {"steps": 1.5}, {"overwrite": "perhaps"}])
def test_ranges_and_types(changes):
    with pytest.raises(ValidationError, match=next(iter(changes))):
        RunSection(**changes)


def test_the_largest_seed_is_accepted():
    assert RunSection(seed=2**63 - 1).seed == 2**63 - 1
