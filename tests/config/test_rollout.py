"""`rollout`: by default the sampled distribution is the trained one."""

import pytest
from pydantic import ValidationError

from rlhf_dist.config.rollout import RolloutSection


def test_nothing_is_cut_off_the_distribution_by_default():
    section = RolloutSection()
    assert (section.temperature, section.top_k, section.top_p, section.stop_strings) == (1.0, 0, 1.0, [])


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.01},
        {"max_new_tokens": 0},
        {"prompts_per_step": 0},
        {"samples_per_prompt": 0},
        {"slots": 0},
        {"shards_per_rank": 0},
        {"engine": "other"},
    ],
)
def test_ranges(changes):
    with pytest.raises(ValidationError, match=next(iter(changes))):
        RolloutSection(**changes)
