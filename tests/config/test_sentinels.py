"""`sentinels`: every limit has a range, and the defaults leave one bad minibatch to a run."""

import pytest
from pydantic import ValidationError

from rlhf_dist.config.sentinels import SentinelsSection


def test_defaults() -> None:
    section = SentinelsSection()
    assert (section.max_skipped, section.capsules, section.patience) == (3, 2, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_skipped": 0}, {"capsules": -1}, {"patience": 0}, {"window": 3}, {"kl_limit": 0}, {"kl_factor": 1}, {"reward_deviations": 0},
        {"reward_share": -0.1}, {"entropy_share": 1}, {"length_factor": 1}, {"max_skiped": 2},
    ],
)  # fmt: skip
def test_ranges(changes: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(changes))):
        SentinelsSection(**changes)
