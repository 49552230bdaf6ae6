from __future__ import annotations

import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.loading import load_config
from rlhf_dist.config.scoring import ScoringConfig


def test_everything_has_a_default_and_the_command_line_sets_it() -> None:
    assert load_config(ScoringConfig, None) == ScoringConfig()
    config = load_config(ScoringConfig, None, ["model.dtype=bf16", "data.max_tokens=64", "data.overlong=truncate"])
    assert (config.model.dtype, config.data.max_tokens, config.data.overlong) == ("bf16", 64, "truncate")


@pytest.mark.parametrize(
    ("override", "said"), [("data.max_token=5", "max_tokens"), ("model.dtype=int8", "fp32"), ("data.overlong=cut", "truncate")]
)
def test_a_typo_is_named(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config(ScoringConfig, None, [override])
