"""`optim`: AdamW as the numerics ask for it."""

import pytest
from pydantic import ValidationError

from rlhf_dist.config.optim import OptimSection


def test_defaults_follow_the_numerics():
    section = OptimSection()
    assert section.eps == 1e-5 and section.clip_norm == 1.0 and section.schedule == "linear"


@pytest.mark.parametrize(
    "changes",
    [{"lr": 0}, {"eps": 0}, {"weight_decay": -1}, {"warmup_steps": -1}, {"clip_norm": -1}, {"betas": (0.9,)}, {"schedule": "cosine"}],
)
def test_ranges(changes):
    with pytest.raises(ValidationError, match=next(iter(changes))):
        OptimSection(**changes)


def test_betas_come_from_yaml_as_a_list():
    assert OptimSection.model_validate({"betas": [0.8, 0.99]}).betas == (0.8, 0.99)
